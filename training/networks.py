"""The text encoders in plain torch, and how the networks start.

`T5Encoder` and `ClipText` are equal to transformers' `T5EncoderModel` and `CLIPTextModel` (pooled
output) and keep their parameter names; transformers' own modules compile badly and cannot be
captured in a CUDA graph. CLIP and the transformer are the package's own: what is trained is what
ships.

Shape letters, in this module only:
    B  batch    T  tokens    D  width    N  heads    K  channels of a head
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_nf4.model.clip import ClipConfig
from flux_nf4.model.clip import ClipText as ClipTokens
from flux_nf4.model.conditioner import MLPEmbedder
from flux_nf4.model.config import FluxConfig, axes_for_head
from flux_nf4.model.transformer import FluxTransformer

NUM_BUCKETS, MAX_DISTANCE = 32, 128  # T5's relative positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of the three networks that are trained together; the defaults are the demo model's."""

    num_heads: int = 4
    num_double_blocks: int = 2
    num_single_blocks: int = 4
    t5_width: int = 192
    t5_inner: int = 768
    t5_layers: int = 4
    t5_vocabulary: int = 1536
    clip_width: int = 128
    clip_layers: int = 2
    clip_vocabulary: int = 2085
    clip_eos_token_id: int = 1
    text_length: int = 32

    @property
    def flux(self) -> FluxConfig:
        """The transformer's config."""
        return FluxConfig(
            hidden_size=64 * self.num_heads,
            num_heads=self.num_heads,
            num_double_blocks=self.num_double_blocks,
            num_single_blocks=self.num_single_blocks,
            context_dim=self.t5_width,
            pooled_dim=self.clip_width,
            axes_dim=axes_for_head(64),
        )


def dry_run_sizes(sizes: Sizes) -> Sizes:
    """The same vocabulary in networks that a CPU trains in seconds."""
    return replace(
        sizes,
        num_heads=1,
        num_double_blocks=1,
        num_single_blocks=1,
        t5_width=64,
        t5_inner=64,
        t5_layers=1,
        clip_width=64,
        clip_layers=1,
    )


def split_heads(x_BTD: Tensor, head_dim: int) -> Tensor:
    """(B, T, D) -> (B, N, T, K)."""
    return x_BTD.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class RMSNorm(nn.Module):
    """Scale to unit mean square, in float32, then by the learned weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> same."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (wide * self.weight.float()).to(x.dtype)


def relative_buckets(num_tokens: int) -> Tensor:
    """T5's bucket of each distance, exact when near and logarithmic when far: () -> (T, T)."""
    positions = torch.arange(num_tokens)
    offset_TT = positions[None] - positions[:, None]
    side = NUM_BUCKETS // 2
    exact = side // 2
    distance_TT = offset_TT.abs()
    ratio_TT = torch.log(distance_TT.clamp(min=1) / exact) / math.log(MAX_DISTANCE / exact)
    far_TT = (exact + (ratio_TT * (side - exact)).long()).clamp(max=side - 1)
    return (offset_TT > 0).long() * side + torch.where(distance_TT < exact, distance_TT, far_TT)


class SelfAttention(nn.Module):
    """Projections of one T5 layer. T5 does not divide by the square root of the head's width."""

    def __init__(self, width: int, head_dim: int, *, has_bias_table: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        if has_bias_table:
            self.relative_attention_bias = nn.Embedding(NUM_BUCKETS, width // head_dim)

    def forward(self, x_BTD: Tensor, bias_1NTT: Tensor) -> Tensor:
        """(B, T, D), (1, N, T, T) -> (B, T, D)."""
        q, k, v = (split_heads(layer(x_BTD), self.head_dim) for layer in (self.q, self.k, self.v))
        bias = bias_1NTT.to(q.dtype).expand(q.shape[0], -1, -1, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(mixed.transpose(1, 2).flatten(2))


class GatedDense(nn.Module):
    """T5 v1.1's feed-forward layer."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(width, inner, bias=False)
        self.wi_1 = nn.Linear(width, inner, bias=False)
        self.wo = nn.Linear(inner, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> same."""
        return self.wo(F.gelu(self.wi_0(x_BTD), approximate="tanh") * self.wi_1(x_BTD))


class T5Layer(nn.Module):
    """Norm, and one of the two kinds of T5 layer under Hugging Face's name for it."""

    def __init__(self, width: int, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.layer_norm = RMSNorm(width)
        self.add_module(name, layer)


class T5Block(nn.Module):
    """Attention, then feed-forward, both residual."""

    def __init__(self, sizes: Sizes, *, is_first: bool) -> None:
        super().__init__()
        attention = SelfAttention(sizes.t5_width, 32, has_bias_table=is_first)
        dense = GatedDense(sizes.t5_width, sizes.t5_inner)
        self.layer = nn.ModuleList(
            [
                T5Layer(sizes.t5_width, "SelfAttention", attention),
                T5Layer(sizes.t5_width, "DenseReluDense", dense),
            ]
        )

    def forward(self, x_BTD: Tensor, bias_1NTT: Tensor) -> Tensor:
        """(B, T, D), (1, N, T, T) -> (B, T, D)."""
        first, second = self.layer
        x_BTD = x_BTD + first.SelfAttention(first.layer_norm(x_BTD), bias_1NTT)
        return x_BTD + second.DenseReluDense(second.layer_norm(x_BTD))


class T5Stack(nn.Module):
    """What Hugging Face calls `encoder`."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            T5Block(sizes, is_first=index == 0) for index in range(sizes.t5_layers)
        )
        self.final_layer_norm = RMSNorm(sizes.t5_width)


class T5Encoder(nn.Module):
    """T5 v1.1 without a padding mask, as FLUX runs it: ids (B, T) -> hidden (B, T, D)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.shared = nn.Embedding(sizes.t5_vocabulary, sizes.t5_width)
        self.encoder = T5Stack(sizes)
        buckets_TT = relative_buckets(sizes.text_length)
        self.register_buffer("buckets_TT", buckets_TT, persistent=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, D)."""
        x_BTD = self.shared(ids_BT)
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        bias_1NTT = table(self.buckets_TT).permute(2, 0, 1)[None]
        for block in self.encoder.block:
            x_BTD = block(x_BTD, bias_1NTT)
        return self.encoder.final_layer_norm(x_BTD)


class ClipText(ClipTokens):
    """CLIP's text encoder, pooled at the first end token: ids (B, T) -> (B, D)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(
            ClipConfig(
                vocabulary_size=sizes.clip_vocabulary,
                hidden_size=sizes.clip_width,
                num_layers=sizes.clip_layers,
                mlp_width=4 * sizes.clip_width,
                max_length=77,
            )
        )
        self.requires_grad_()  # the package's embeddings are frozen, and hold nothing: `start_clip`
        self.eos_token_id = sizes.clip_eos_token_id

    def forward(self, ids_BT: Tensor) -> Tensor:
        """(B, T) int64 -> (B, D)."""
        x_BTD = super().forward(ids_BT)
        ends_B = (ids_BT == self.eos_token_id).int().argmax(1)
        rows_B = torch.arange(ids_BT.shape[0], device=ids_BT.device)
        return x_BTD[rows_B, ends_B]


@dataclass(slots=True, kw_only=True)
class Networks:
    """The three networks that turn a caption and noise into a velocity."""

    transformer: FluxTransformer
    t5: T5Encoder
    clip: ClipText

    def modules(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """All three."""
        return self.transformer, self.t5, self.clip

    def encode(self, t5_BT: Tensor, clip_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids -> what the transformer is conditioned on, (B, T, D) and (B, D)."""
        return self.t5(t5_BT), self.clip(clip_BT)


def make_networks(sizes: Sizes, device: torch.device, *, compiled: bool = False) -> Networks:
    """New networks with their starting weights; compiled lazily, at their first call."""
    networks = Networks(
        transformer=start_transformer(FluxTransformer(sizes.flux)).to(device),
        t5=start_t5(T5Encoder(sizes)).to(device),
        clip=start_clip(ClipText(sizes)).to(device),
    )
    if compiled:
        # The encoders go block by block: embeddings and their gradients are faster outside.
        networks.transformer.compile(dynamic=False)
        for block in (*networks.t5.encoder.block, *networks.clip.text_model.encoder.layers):
            block.compile(dynamic=False)
    return networks


def matrix_pieces(name: str, weight: Tensor) -> list[int] | None:
    """Row counts of the matrices that a fused layer of the blocks holds; None for any other.

    qkv is three matrices, linear1 those and the MLP's: each is started, and later made orthogonal
    by Muon, on its own. `name` is a parameter name of `FluxTransformer`.
    """
    if not name.startswith(("blocks.double_blocks.", "blocks.single_blocks.")) or weight.ndim != 2:
        return None
    hidden = weight.shape[1]
    if name.endswith("qkv.weight"):
        return [hidden] * 3
    if name.endswith("linear1.weight"):
        return [hidden] * 3 + [weight.shape[0] - 3 * hidden]
    return [weight.shape[0]]


@torch.no_grad()
def start_transformer(transformer: FluxTransformer) -> FluxTransformer:
    """Xavier, small embedders; modulation and output start at zero (adaLN-zero of DiT)."""
    for name, parameter in transformer.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            pieces = matrix_pieces(name, parameter) or [parameter.shape[0]]
            for piece in parameter.split(pieces):
                nn.init.xavier_uniform_(piece)
    conditioner = transformer.conditioner
    for layer in (*conditioner.double_blocks, *conditioner.single_blocks, conditioner.final_layer):
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)
    for module in conditioner.modules():
        if isinstance(module, MLPEmbedder):
            nn.init.normal_(module.in_layer.weight, std=0.02)
            nn.init.normal_(module.out_layer.weight, std=0.02)
    nn.init.zeros_(transformer.blocks.final_layer.linear.weight)
    return transformer


@torch.no_grad()
def start_t5(t5: T5Encoder) -> T5Encoder:
    """Mesh TensorFlow's starting weights, but heads that look at neighbours from the start.

    The starting scales are those that T5's missing attention scale relies on. Its biases of
    distance begin so small that attention hardly differs from a mean, and the order of words was
    not found out in 15 million captions.
    """
    nn.init.normal_(t5.shared.weight, std=1.0)
    for name, parameter in t5.encoder.named_parameters():
        if parameter.ndim == 2 and "relative" not in name:
            scale = 32 if name.endswith(".q.weight") else 1
            nn.init.normal_(parameter, std=(parameter.shape[1] * scale) ** -0.5)
    attention = t5.encoder.block[0].layer[0].SelfAttention
    attention.relative_attention_bias.weight.copy_(
        neighbour_biases(attention.relative_attention_bias.embedding_dim)
    )
    return t5


def neighbour_biases(num_heads: int) -> Tensor:
    """A bias for each bucket of distance and head, (buckets, N), in values that e4m3 holds.

    By turns: one back, one ahead, two back, two ahead, all that came before, all that follows.
    """
    biases = torch.zeros(NUM_BUCKETS, num_heads)
    side = NUM_BUCKETS // 2
    nearer = 3 - 0.75 * torch.arange(side).clamp(max=8)
    for head in range(num_heads):
        ahead, kind = side * (head % 2), head % 6 // 2
        if kind < 2:
            biases[ahead + kind + 1, head] = 4.0
        else:
            biases[:, head] = -3.0
            biases[ahead : ahead + side, head] = nearer
    return biases


@torch.no_grad()
def start_clip(clip: ClipText) -> ClipText:
    """Small embeddings; the rest keeps torch's defaults."""
    nn.init.normal_(clip.text_model.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(clip.text_model.embeddings.position_embedding.weight, std=0.02)
    return clip


def transformer_weights(transformer: FluxTransformer) -> dict[str, Tensor]:
    """Weights under BFL's names, without the name of the part that owns them."""
    return {name.split(".", 1)[1]: tensor for name, tensor in transformer.state_dict().items()}


def load_transformer_weights(transformer: FluxTransformer, weights: dict[str, Tensor]) -> None:
    """The inverse of `transformer_weights`: every name is needed, none may be left over."""
    own = {name.split(".", 1)[1]: name for name in transformer.state_dict()}
    transformer.load_state_dict({own.get(name, name): value for name, value in weights.items()})
