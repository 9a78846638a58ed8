"""T5 v1.1's encoder: one vector for each token. Equal to transformers' `T5EncoderModel`.

Padding is attended to, as in FLUX's training: there is no mask. T5 overflows in float16 and is
never run in it. Names of modules are Hugging Face's, so that a checkpoint's names are theirs.

Shape letters, in this module only:
    B  batch    T  tokens    D  hidden size    N  heads
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_nf4.model.assemble import empty_embedding

EPSILON = 1e-6
NUM_BUCKETS = 32  # of relative distance, in every published T5
MAX_DISTANCE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Config:
    """Sizes of an encoder."""

    vocabulary_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    mlp_width: int


class T5(nn.Module):
    """The table of tokens and the layers."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.shared = empty_embedding(config.vocabulary_size, config.hidden_size)
        self.encoder = _Encoder(config)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """(B, T) -> (B, T, D). The table may lie in main memory while the layers are on a GPU."""
        (table,) = self.shared.state_dict().values()
        rows_BTD = self.shared(ids_BT.to(table.device)).to(ids_BT.device)
        return self.encoder(rows_BTD)


class _Encoder(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            _Block(config, has_bias=i == 0) for i in range(config.num_layers)
        )
        self.final_layer_norm = _RMSNorm(config.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        bias_1NTT = None
        for block in self.block:
            x_BTD, bias_1NTT = block(x_BTD, bias_1NTT)
        return self.final_layer_norm(x_BTD)


class _Block(nn.Module):
    """Attention, then a feed-forward layer; the first one's bias of distance serves all."""

    def __init__(self, config: T5Config, *, has_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            [_AttentionLayer(config, has_bias=has_bias), _FeedForwardLayer(config)]
        )

    def forward(self, x_BTD: Tensor, bias_1NTT: Tensor | None) -> tuple[Tensor, Tensor]:
        attention, feed_forward = self.layer
        if bias_1NTT is None:
            bias_1NTT = cast("_AttentionLayer", attention).SelfAttention.bias(x_BTD)
        return feed_forward(attention(x_BTD, bias_1NTT)), bias_1NTT


class _AttentionLayer(nn.Module):
    def __init__(self, config: T5Config, *, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = _SelfAttention(config, has_bias=has_bias)
        self.layer_norm = _RMSNorm(config.hidden_size)

    def forward(self, x_BTD: Tensor, bias_1NTT: Tensor) -> Tensor:
        return x_BTD + self.SelfAttention(self.layer_norm(x_BTD), bias_1NTT)


class _SelfAttention(nn.Module):
    def __init__(self, config: T5Config, *, has_bias: bool) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        width = config.num_heads * config.head_dim
        self.q = nn.Linear(config.hidden_size, width, bias=False)
        self.k = nn.Linear(config.hidden_size, width, bias=False)
        self.v = nn.Linear(config.hidden_size, width, bias=False)
        self.o = nn.Linear(width, config.hidden_size, bias=False)
        if has_bias:
            self.relative_attention_bias = empty_embedding(NUM_BUCKETS, config.num_heads)

    def bias(self, x_BTD: Tensor) -> Tensor:
        """What each head adds for each distance: (1, N, T, T)."""
        positions_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        buckets_TT = distance_buckets(positions_T[None] - positions_T[:, None])
        # All layers read it: heads first, or each of them would copy it.
        return self.relative_attention_bias(buckets_TT).permute(2, 0, 1).contiguous()[None]

    def forward(self, x_BTD: Tensor, bias_1NTT: Tensor) -> Tensor:
        q, k, v = (
            layer(x_BTD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        # T5 is trained without the usual scale.
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_1NTT, scale=1.0)
        return self.o(mixed.transpose(1, 2).flatten(2))


class _FeedForwardLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = _GatedGelu(config)
        self.layer_norm = _RMSNorm(config.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.DenseReluDense(self.layer_norm(x_BTD))


class _GatedGelu(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.hidden_size, config.mlp_width, bias=False)
        self.wi_1 = nn.Linear(config.hidden_size, config.mlp_width, bias=False)
        self.wo = nn.Linear(config.mlp_width, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x_BTD), approximate="tanh") * self.wi_1(x_BTD))


class _RMSNorm(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x_BTD: Tensor) -> Tensor:
        # Rounded before the weight is applied, as in training.
        normed = F.rms_norm(x_BTD.float(), x_BTD.shape[-1:], eps=EPSILON)
        return self.weight * normed.to(self.weight.dtype)


def distance_buckets(distance: Tensor) -> Tensor:
    """Distances (int64, key after query positive) -> buckets of the same shape.

    Half of them for each direction; of those half for a distance each, the others for distances
    that grow by a constant factor, up to `MAX_DISTANCE`.
    """
    half, exact = NUM_BUCKETS // 2, NUM_BUCKETS // 4
    size = distance.abs()
    growth = torch.log(size.float() / exact) / math.log(MAX_DISTANCE / exact)
    far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(size < exact, size, far) + half * (distance > 0)
