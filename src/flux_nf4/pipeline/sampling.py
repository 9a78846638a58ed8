"""Sampling without the model: schedule, noise, packing and the Euler step. Pure.

FLUX learns the velocity from image to noise along a straight line, so sampling is an Euler
integration from sigma 1 (noise) to sigma 0 (image). The schedule `flux` is equal to Diffusers'
`FlowMatchEulerDiscreteScheduler` in float32, bit for bit. Noise is drawn in float32 on the CPU,
whatever device computes, so that a seed is the same image everywhere. Diffusers draws the same
values from a CPU generator (a bf16 pipeline rounds them), and so do Forge and A1111 where their
random number source is set to CPU: one generator per image, filled in the order (C, H, W).

Shape letters, in this module only:
    B  batch               L  image tokens, H/2 * W/2      S  steps
    C  latent channels     D  token channels, 4 * C        K  steps + 1
    H, W  height and width of the latent, an eighth of the image's
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from flux_nf4.errors import InputError, ShapeError
from flux_nf4.pipeline.limits import MAX_STEPS, PIXELS_PER_TOKEN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from flux_nf4.formats.facts import Facts
    from flux_nf4.pipeline.limits import ScheduleKind

LATENT_CHANNELS = 16
PIXELS_PER_LATENT = 8  # the VAE's reduction


def token_grid(width: int, height: int) -> tuple[int, int]:
    """Rows and columns of image tokens of an image of this size in pixels."""
    return height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN


def shift_exponent(num_image_tokens: int, facts: Facts) -> float:
    """The exponent of the time shift (`mu`): linear in the tokens between the two fitted counts."""
    slope = (facts.max_shift - facts.base_shift) / (
        facts.max_image_seq_len - facts.base_image_seq_len
    )
    return num_image_tokens * slope + (facts.base_shift - slope * facts.base_image_seq_len)


def make_schedule(
    num_inference_steps: int, num_image_tokens: int, facts: Facts, *, kind: ScheduleKind = "flux"
) -> Tensor:
    """The sigma of every step, and the 0 at the end: (K,) float32, falling from 1.

    `flux` shifts by the image's size, as the model's authors and Diffusers do. `forge` shifts by
    `facts.max_shift` at any size (for FLUX.1-dev e^1.15 = 3.158): what Forge does with its
    scheduler `Simple`, and ComfyUI without its node ModelSamplingFlux
    (Comfy-Org/ComfyUI#4514, bghira/SimpleTuner#892). Those two pick from a finely spaced table,
    which may move a sigma by the spacing; ours are the exact values. A model without dynamic
    shifting (schnell) has one schedule, the one of `facts.shift`.

    Raises:
        InputError: there are not 1 to 1000 steps.
    """
    if not 1 <= num_inference_steps <= MAX_STEPS:
        raise InputError(f"{num_inference_steps} steps: the number must be 1 to {MAX_STEPS}")
    times_S = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).astype(np.float32)
    # The order of operations below is Diffusers': float32 results are equal only if it is.
    if facts.use_dynamic_shifting:
        exponent = facts.max_shift if kind == "forge" else shift_exponent(num_image_tokens, facts)
        shift = math.exp(exponent)
        sigmas_S = shift / (shift + (1 / times_S - 1))
    else:
        sigmas_S = facts.shift * times_S / (1 + (facts.shift - 1) * times_S)
    return torch.from_numpy(np.append(sigmas_S, np.float32(0)))


def draw_noise(seeds: Sequence[int], width: int, height: int) -> Tensor:
    """Noise for one image a seed, each from its own generator: (B, C, H, W) float32 on the CPU.

    An image's noise does not depend on its neighbours: any image of a batch can be repeated alone.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return draw_noise_from(generators, 1, width, height)


def draw_noise_from(
    generators: Sequence[torch.Generator], num_each: int, width: int, height: int
) -> Tensor:
    """The next noise of each generator, for `num_each` images: (B, C, H, W), as `draw_noise`.

    On the generators' device. Equal to what Diffusers draws from them.
    """
    shape = (num_each, LATENT_CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    return torch.cat(
        [
            torch.randn(shape, generator=each, device=each.device, dtype=torch.float32)
            for each in generators
        ]
    )


def pack(latents_BCHW: Tensor) -> Tensor:
    """Each 2 x 2 square of latents becomes one token: (B, C, H, W) -> (B, L, D).

    Raises:
        ShapeError: height or width is odd.
    """
    batch, channels, height, width = latents_BCHW.shape
    if height % 2 or width % 2:
        raise ShapeError(f"latents of {height} x {width} do not divide into squares of 2 x 2")
    squares = latents_BCHW.reshape(batch, channels, height // 2, 2, width // 2, 2)
    tokens = squares.permute(0, 2, 4, 1, 3, 5)  # batch, row, column, channel, row and column in it
    return tokens.reshape(batch, (height // 2) * (width // 2), 4 * channels)


def unpack(tokens_BLD: Tensor, width: int, height: int) -> Tensor:
    """The inverse of `pack`, for an image of `width` x `height` pixels: (B, L, D) -> (B, C, H, W).

    Raises:
        ShapeError: the number of tokens is not that of the size.
    """
    batch, num_tokens, token_channels = tokens_BLD.shape
    rows, columns = token_grid(width, height)
    if num_tokens != rows * columns:
        raise ShapeError(f"{num_tokens} tokens are not an image of {width} x {height} pixels")
    squares = tokens_BLD.reshape(batch, rows, columns, token_channels // 4, 2, 2)
    latents = squares.permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(batch, token_channels // 4, 2 * rows, 2 * columns)


def euler_step(x_BLD: Tensor, v_BLD: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """Move along the velocity from `sigma` to `next_sigma`: (B, L, D) float32 -> same.

    The difference is taken in float32, as Diffusers does with its float32 sigmas.
    """
    step = float(np.float32(next_sigma) - np.float32(sigma))
    return x_BLD + step * v_BLD.float()


def add_noise(image_BLD: Tensor, noise_BLD: Tensor, sigma: float) -> Tensor:
    """The point at `sigma` of the straight line from an image's latents to noise."""
    return sigma * noise_BLD + (1 - sigma) * image_BLD


def guide(v_BLD: Tensor, v_negative_BLD: Tensor, guidance_scale: float) -> Tensor:
    """True classifier-free guidance: away from the negative prompt's velocity, by the scale."""
    return v_negative_BLD + guidance_scale * (v_BLD - v_negative_BLD)


def predict_image(x_BLD: Tensor, v_BLD: Tensor, sigma: float) -> Tensor:
    """Where the velocity leads if followed to the end: the latents that a preview shows."""
    return x_BLD - sigma * v_BLD.float()
