"""The networks of FLUX's autoencoder. Equal to Diffusers' `AutoencoderKL` on the same weights.

Names of modules are Diffusers', so that a checkpoint's names are theirs.

Shape letters, in this module only:
    B  batch    C  channels    H, W  rows and columns    Z  latent channels
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-6
RGB = 3  # channels of an image


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeConfig:
    """Sizes: channels of each level, the finest first; residual blocks of an encoder's level."""

    widths: tuple[int, ...]
    num_resnets: int
    latent_channels: int
    norm_groups: int


class Vae(nn.Module):
    """Encoder and decoder; FLUX's has no 1 x 1 convolutions between them, as older ones have."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = _Encoder(config), _Decoder(config)

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Images -> means and log variances of the latents, (B, 2 * Z, H / 8, W / 8)."""
        return self.encoder(images_B3HW)

    def decode(self, latents_BZHW: Tensor) -> Tensor:
        """Latents -> images, (B, 3, 8 * H, 8 * W)."""
        return self.decoder(latents_BZHW)


class _Encoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = _conv(RGB, widths[0])
        self.down_blocks = nn.ModuleList(
            DownBlock(config, before, after, is_last=after_index == len(widths) - 1)
            for after_index, (before, after) in enumerate(_steps(widths))
        )
        self.mid_block = MidBlock(config)
        self.conv_norm_out = _norm(config, widths[-1])
        self.conv_out = _conv(widths[-1], 2 * config.latent_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(x_BCHW)
        for block in self.down_blocks:
            x_BCHW = block(x_BCHW)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x_BCHW))))


class _Decoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = _conv(config.latent_channels, widths[0])
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(
            UpBlock(config, before, after, is_last=after_index == len(widths) - 1)
            for after_index, (before, after) in enumerate(_steps(widths))
        )
        self.conv_norm_out = _norm(config, widths[-1])
        self.conv_out = _conv(widths[-1], RGB)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.mid_block(self.conv_in(x_BCHW))
        for block in self.up_blocks:
            x_BCHW = block(x_BCHW)
        return self.conv_out(F.silu(self.conv_norm_out(x_BCHW)))


class DownBlock(nn.Module):
    """A level of the encoder: residual blocks, then half the size, but for the last level."""

    def __init__(self, config: VaeConfig, before: int, after: int, *, is_last: bool) -> None:
        super().__init__()
        self.resnets = _resnets(config, before, after, config.num_resnets)
        self.downsamplers = None if is_last else nn.ModuleList([_Downsampler(after)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
        for layer in (*self.resnets, *(self.downsamplers or ())):
            x_BCHW = layer(x_BCHW)
        return x_BCHW


class UpBlock(nn.Module):
    """A level of the decoder: residual blocks, one more, then twice the size."""

    def __init__(self, config: VaeConfig, before: int, after: int, *, is_last: bool) -> None:
        super().__init__()
        self.resnets = _resnets(config, before, after, config.num_resnets + 1)
        self.upsamplers = None if is_last else nn.ModuleList([_Upsampler(after)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 * H, 2 * W)."""
        for layer in (*self.resnets, *(self.upsamplers or ())):
            x_BCHW = layer(x_BCHW)
        return x_BCHW


class MidBlock(nn.Module):
    """The coarsest level: attention between two residual blocks."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        self.resnets = _resnets(config, width, width, 2)
        self.attentions = nn.ModuleList([_Attention(config, width)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> same."""
        before, after = self.resnets
        return after(self.attentions[0](before(x_BCHW)))


class ResnetBlock(nn.Module):
    """Twice norm, SiLU and convolution, beside the input."""

    def __init__(self, config: VaeConfig, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(config, before), _conv(before, after)
        self.norm2, self.conv2 = _norm(config, after), _conv(after, after)
        self.conv_shortcut = None if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> the same with the channels of this block."""
        inner = self.conv1(F.silu(self.norm1(x_BCHW)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return inner + (x_BCHW if self.conv_shortcut is None else self.conv_shortcut(x_BCHW))


class _Attention(nn.Module):
    """Every place of a map looks at every other, with one head."""

    def __init__(self, config: VaeConfig, width: int) -> None:
        super().__init__()
        self.group_norm = _norm(config, width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        places = self.group_norm(x_BCHW).flatten(2).transpose(1, 2)[:, None]
        q, k, v = self.to_q(places), self.to_k(places), self.to_v(places)
        mixed = self.to_out[0](F.scaled_dot_product_attention(q, k, v))[:, 0]
        return x_BCHW + mixed.transpose(1, 2).unflatten(2, x_BCHW.shape[2:])


class _Downsampler(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))  # at the end alone, as in training


class _Upsampler(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv(width, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


def _resnets(config: VaeConfig, before: int, after: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(
        ResnetBlock(config, before if i == 0 else after, after) for i in range(count)
    )


def _steps(widths: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The channels before and after each level; before the first they are its own."""
    return zip((widths[0], *widths), widths, strict=False)


def _conv(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1)


def _norm(config: VaeConfig, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, width, eps=EPSILON)
