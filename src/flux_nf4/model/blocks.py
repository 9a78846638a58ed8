"""The blocks: what runs every step. They take their modulation as input and own none of it.

This is the model to read, to train and to compare with others. Where no gradients are wanted, and
a GPU gains by it, `fast_step` runs the same layers with fewer and larger kernels between them.

Names of modules are BFL's, so that a checkpoint's names are theirs with no mapping in between.

Shape letters, in this module only:
    B  batch    L  image tokens    T  text tokens    S  T + L    H  hidden size
    N  heads    D  head channels   F  D / 2          C  channels of a packed image token
    M  modulation width            K  adaLN vectors
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_nf4.model.config import MLP_RATIO, FluxConfig
from flux_nf4.model.rope import rotate

EPSILON = 1e-6


def modulate(x_BSH: Tensor, shift_BH: Tensor, scale_BH: Tensor) -> Tensor:
    """LayerNorm without weights, then adaLN's shift and scale: (B, S, H) -> same."""
    normed_BSH = F.layer_norm(x_BSH, x_BSH.shape[-1:], eps=EPSILON)
    return torch.addcmul(shift_BH[:, None], normed_BSH, 1 + scale_BH[:, None])


class RMSNorm(nn.Module):
    """The learned scale of a QK norm. BFL calls its vector `scale`."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(head_dim))


class QKNorm(nn.Module):
    """RMS norm of queries and keys, then their rotation, in float32 throughout."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, q_BNSD: Tensor, k_BNSD: Tensor, rope_2SF: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, S, D) twice -> the same shapes and dtypes, normed and rotated."""
        out = []
        for x_BNSD, norm in ((q_BNSD, self.query_norm), (k_BNSD, self.key_norm)):
            normed = F.rms_norm(x_BNSD.float(), x_BNSD.shape[-1:], norm.scale.float(), EPSILON)
            out.append(rotate(normed, rope_2SF).to(x_BNSD.dtype))
        return out[0], out[1]


class StreamAttention(nn.Module):
    """One stream's share of a double block's attention: its projections and norms."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def project(self, x_BSH: Tensor, rope_2SF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, H) -> q, k, v of (B, N, S, D), q and k normed and rotated."""
        q, k, v = (split_heads(x, self.num_heads) for x in self.qkv(x_BSH).chunk(3, dim=-1))
        return *self.norm(q, k, rope_2SF), v


def split_heads(x_BSH: Tensor, num_heads: int) -> Tensor:
    """(B, S, H) -> (B, N, S, D)."""
    return x_BSH.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
    """Every token looks at every other: (B, N, S, D) three times -> (B, S, H)."""
    return F.scaled_dot_product_attention(q_BNSD, k_BNSD, v_BNSD).transpose(1, 2).flatten(2)


def mlp(hidden_size: int) -> nn.Sequential:
    """Linear, GELU (tanh form), linear: (B, S, H) -> same."""
    inner = MLP_RATIO * hidden_size
    return nn.Sequential(
        nn.Linear(hidden_size, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, hidden_size)
    )


class DoubleStreamBlock(nn.Module):
    """Image and text keep weights of their own and meet in one attention."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.img_attn, self.txt_attn = StreamAttention(config), StreamAttention(config)
        self.img_mlp, self.txt_mlp = mlp(config.hidden_size), mlp(config.hidden_size)

    def forward(
        self, img_BLH: Tensor, txt_BTH: Tensor, modulation_B12H: Tensor, rope_2SF: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, L, H), (B, T, H), (B, 12 * H) -> the two streams, updated."""
        img_modulation, txt_modulation = modulation_B12H.chunk(2, dim=-1)
        img_shift1, img_scale1, img_gate1, *img_rest = img_modulation.chunk(6, dim=-1)
        txt_shift1, txt_scale1, txt_gate1, *txt_rest = txt_modulation.chunk(6, dim=-1)
        num_txt = txt_BTH.shape[1]

        txt_qkv = self.txt_attn.project(
            modulate(txt_BTH, txt_shift1, txt_scale1), rope_2SF[:, :num_txt]
        )
        img_qkv = self.img_attn.project(
            modulate(img_BLH, img_shift1, img_scale1), rope_2SF[:, num_txt:]
        )
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True))
        mixed_BSH = attend(q, k, v)
        txt_mixed, img_mixed = mixed_BSH[:, :num_txt], mixed_BSH[:, num_txt:]

        img_BLH = img_BLH + img_gate1[:, None] * self.img_attn.proj(img_mixed)
        txt_BTH = txt_BTH + txt_gate1[:, None] * self.txt_attn.proj(txt_mixed)
        return (
            self._feed_forward(self.img_mlp, img_BLH, img_rest),
            self._feed_forward(self.txt_mlp, txt_BTH, txt_rest),
        )

    @staticmethod
    def _feed_forward(layers: nn.Module, x_BSH: Tensor, vectors: list[Tensor]) -> Tensor:
        shift_BH, scale_BH, gate_BH = vectors
        return x_BSH + gate_BH[:, None] * layers(modulate(x_BSH, shift_BH, scale_BH))


class SingleStreamBlock(nn.Module):
    """Image and text as one sequence; attention and MLP side by side in two fused layers."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.num_heads = config.num_heads
        self.widths = [3 * hidden_size, MLP_RATIO * hidden_size]
        self.linear1 = nn.Linear(hidden_size, sum(self.widths))
        self.linear2 = nn.Linear((1 + MLP_RATIO) * hidden_size, hidden_size)
        self.norm = QKNorm(config.head_dim)

    def forward(self, x_BSH: Tensor, modulation_B3H: Tensor, rope_2SF: Tensor) -> Tensor:
        """(B, S, H), (B, 3 * H) -> (B, S, H)."""
        shift_BH, scale_BH, gate_BH = modulation_B3H.chunk(3, dim=-1)
        projected = self.linear1(modulate(x_BSH, shift_BH, scale_BH))
        qkv, inner = projected.split(self.widths, dim=-1)
        q, k, v = (split_heads(x, self.num_heads) for x in qkv.chunk(3, dim=-1))
        q, k = self.norm(q, k, rope_2SF)
        joined = torch.cat((attend(q, k, v), F.gelu(inner, approximate="tanh")), dim=-1)
        return x_BSH + gate_BH[:, None] * self.linear2(joined)


class FinalLayer(nn.Module):
    """Modulated norm, then the projection to the velocity of each token."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.out_channels)

    def forward(self, x_BLH: Tensor, modulation_B2H: Tensor) -> Tensor:
        """(B, L, H), (B, 2 * H) -> (B, L, C)."""
        shift_BH, scale_BH = modulation_B2H.chunk(2, dim=-1)
        return self.linear(modulate(x_BLH, shift_BH, scale_BH))


def call_hooks(block: nn.Module) -> None:
    """The hooks of a block that runs without being called: they may wait for its weights."""
    for hook in block._forward_pre_hooks.values():
        hook(block, ())


class FluxBlocks(nn.Module):
    """From noisy image tokens, text tokens and one table row to the predicted velocity."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        # `fast_step.fast_step`, set by whoever builds a model to draw with.
        self.fast_step: Callable[[FluxBlocks, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
        # What `fast_step` does before each block, which it does not call.
        self.on_block: Callable[[nn.Module], None] = call_hooks
        self.img_in = nn.Linear(config.in_channels, config.hidden_size)
        self.txt_in = nn.Linear(config.context_dim, config.hidden_size)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(config) for _ in range(config.num_double_blocks)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(config) for _ in range(config.num_single_blocks)
        )
        self.final_layer = FinalLayer(config)

    def forward(
        self, img_BLC: Tensor, txt_BTD: Tensor, modulation_BM: Tensor, rope_2SF: Tensor
    ) -> Tensor:
        """(B, L, C), (B, T, context), (B, M), (2, S, F) -> velocity (B, L, C)."""
        if self.fast_step is not None and not torch.is_grad_enabled():
            return self.fast_step(self, img_BLC, txt_BTD, modulation_BM, rope_2SF)
        return self.plain_step(img_BLC, txt_BTD, modulation_BM, rope_2SF)

    def plain_step(
        self, img_BLC: Tensor, txt_BTD: Tensor, modulation_BM: Tensor, rope_2SF: Tensor
    ) -> Tensor:
        """As `forward`, block by block as they stand here."""
        double, single, final = self.vectors(modulation_BM)
        img, txt = self.img_in(img_BLC), self.txt_in(txt_BTD)
        for i, block in enumerate(self.double_blocks):
            img, txt = block(img, txt, double[i], rope_2SF)
        x_BSH = torch.cat((txt, img), dim=1)
        for i, block in enumerate(self.single_blocks):
            x_BSH = block(x_BSH, single[i], rope_2SF)
        return self.final_layer(x_BSH[:, txt.shape[1] :], final)

    def vectors(self, modulation_BM: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """A row, cut up: (B, 12 * H) a double block, (B, 3 * H) a single one; last (B, 2 * H)."""
        config, hidden_size = self.config, self.config.hidden_size
        widths = [12] * config.num_double_blocks + [3] * config.num_single_blocks + [2]
        pieces = modulation_BM.split([width * hidden_size for width in widths], dim=-1)
        num_double = config.num_double_blocks
        return list(pieces[:num_double]), list(pieces[num_double:-1]), pieces[-1]
