"""What a phase needs beside its weights, in bytes: derived from the modules, line by line.

Each formula bounds the bytes that are alive at the worst moment; a test counts the live tensors of
the real modules on the CPU and holds the formulas to them, never under and little over. Taken for
granted, as it cannot be seen there: attention and norms on a GPU run as one kernel each and keep
no matrix of scores, and cuDNN copies input and output of a convolution into its own layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flux_nf4.memory.inventory import Inventory, Sizes

PIXELS_PER_TOKEN = 16
CLIP_TOKENS = 77
FLOAT_BYTES = 4
RGB = 3
STRIP_PIXELS = 2**15  # of a level, that the VAE works out at once
ATTENTION_MAPS = 10  # of the VAE's coarsest level, around its attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is to be drawn: pixels, images, steps, text tokens; `is_guided` is true CFG."""

    width: int
    height: int
    num_images: int = 1
    num_steps: int = 20
    num_text_tokens: int = 512
    is_guided: bool = False

    @property
    def num_tokens(self) -> int:
        """Image tokens of one image."""
        return (self.width // PIXELS_PER_TOKEN) * (self.height // PIXELS_PER_TOKEN)

    @property
    def num_passes(self) -> int:
        """Passes through the blocks a step: one for each prompt."""
        return 2 if self.is_guided else 1


def text_bytes(inventory: Inventory, workload: Workload) -> int:
    """The worst moment of T5, in attention or feed-forward layers, or of CLIP after it."""
    sizes, num_tokens = inventory.sizes, workload.num_text_tokens
    row = workload.num_passes * num_tokens * sizes.compute_bytes
    bias = sizes.t5_heads * num_tokens**2 * sizes.compute_bytes
    buckets = 8 * num_tokens**2 * 8  # distances as int64, a dozen steps from positions to buckets
    attention = 2 * bias + 5 * row * sizes.t5_attention_width
    feed_forward = bias + 6 * row * sizes.t5_mlp_width + inventory.t5_scratch_bytes
    clip_row = workload.num_passes * CLIP_TOKENS * sizes.compute_bytes
    clip = 5 * clip_row * sizes.clip_mlp_width
    return 3 * row * sizes.context_dim + max(attention, feed_forward, 2 * bias + buckets, clip)


def embedding_bytes(sizes: Sizes, workload: Workload) -> int:
    """The text tokens that the blocks read, one sequence for each prompt."""
    num_values = workload.num_passes * workload.num_text_tokens * sizes.context_dim
    return num_values * sizes.compute_bytes


def table_bytes(sizes: Sizes, workload: Workload) -> int:
    """The modulation tables: every vector of every step, one table for each prompt."""
    num_rows = workload.num_passes * workload.num_steps
    return num_rows * sizes.modulation_width * sizes.compute_bytes


def modulation_bytes(inventory: Inventory, workload: Workload) -> int:
    """The conditioner's worst moment: its last rows are joined, and the pieces are still there."""
    sizes = inventory.sizes
    table = table_bytes(sizes, workload)
    pieces = table // workload.num_passes
    embedded = 4 * workload.num_steps * sizes.hidden_size * sizes.compute_bytes
    largest = max(pieces, inventory.conditioner_scratch_bytes)
    return embedding_bytes(sizes, workload) + table + largest + embedded


def denoise_bytes(inventory: Inventory, workload: Workload, batch_size: int) -> int:
    """A step's worst moment: a single block joins attention and MLP; or a weight is expanded.

    In units of one activation, (batch, tokens, hidden): the block's input and what the loop over
    blocks still holds 2, its first product 7, queries and keys 2, attention 1, the MLP's inner
    values 4, both joined 5: 21. Where the largest weight is expanded 17 are alive.

    The fused step lets go of more: tokens 1, their rows 1, the product 7, attention 1, both joined
    5: 15, beside a buffer for weights that stays.
    """
    sizes = inventory.sizes
    num_tokens = workload.num_tokens + workload.num_text_tokens
    unit = batch_size * num_tokens * sizes.hidden_size * sizes.compute_bytes
    rope = num_tokens * sizes.head_dim * FLOAT_BYTES
    # The latents, their cast, the velocities of both prompts, and the Euler step's float32.
    latents = 8 * batch_size * workload.num_tokens * sizes.in_channels * FLOAT_BYTES
    tables = table_bytes(sizes, workload) + embedding_bytes(sizes, workload)
    scratch = inventory.block_scratch_bytes
    step = 15 * unit + scratch if inventory.is_fused else max(21 * unit, 17 * unit + scratch)
    return step + rope + latents + tables


def decode_bytes(sizes: Sizes, workload: Workload, batch_size: int) -> int:
    """The VAE's worst moment over its levels, in strips (`model.strips`), beside the pictures.

    Of a level from I to O channels two maps are held: the block's input, which at first is that of
    the level below, and its inner map. Beside them a strip with the rows around it: padded,
    multiplied and normed, and at first enlarged, with cuDNN's copies of a convolution's ends.
    """
    num_pixels = workload.width * workload.height
    widths = sizes.vae_widths
    coarsest = len(widths) - 1
    worst = ATTENTION_MAPS * widths[-1] * num_pixels // 4**coarsest
    for level, num_out in enumerate(widths):
        num_in = widths[min(level + 1, coarsest)]
        pixels = num_pixels // 4**level
        strip = min(pixels, STRIP_PIXELS + 4 * (workload.width >> level))
        first = (num_out + num_in // 4) * pixels + (5 * num_in + 3 * num_out) * strip
        others = 2 * num_out * pixels + 6 * num_out * strip
        worst = max(worst, first, others)
    pictures = (2 * batch_size + 4) * RGB * workload.width * workload.height * FLOAT_BYTES
    return worst * sizes.compute_bytes + pictures


def decode_flops(sizes: Sizes, num_pixels: int) -> int:
    """Floating-point operations of decoding so many pixels: the convolutions of every level."""
    widths, total = sizes.vae_widths, 0
    for level, num_out in enumerate(widths):
        num_in = widths[min(level + 1, len(widths) - 1)]
        convolutions = num_in * num_out + (2 * sizes.vae_num_resnets + 1) * num_out**2
        if level + 1 < len(widths):
            convolutions += num_in**2  # after the doubling from the coarser level
        total += 2 * 9 * convolutions * num_pixels // 4**level
    return total


def step_flops(inventory: Inventory, workload: Workload, batch_size: int) -> int:
    """Floating-point operations of one step: the blocks' products, and attention."""
    num_tokens = workload.num_tokens + workload.num_text_tokens
    products = 2 * num_tokens * sum(block.weights_per_token for block in inventory.blocks)
    attention = 4 * num_tokens**2 * inventory.sizes.hidden_size * len(inventory.blocks)
    return (products + attention) * batch_size * workload.num_passes
