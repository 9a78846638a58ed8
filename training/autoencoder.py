"""The VAE in plain torch: equal to Diffusers' `AutoencoderKL`, with its parameter names.

Sixteen latent channels at an eighth of the size, no quant convolutions, as in FLUX.1; only the
widths are smaller. Written out because the machine that trains need not have Diffusers, and so
that its step can be compiled and captured whole.

Shape letters, in this module only:
    B  batch    C  channels    H, W  height and width    Z  latent channels
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_CHANNELS = 16
EPSILON = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderSizes:
    """Widths of the four resolutions; the defaults are the demo model's."""

    widths: tuple[int, ...] = (32, 48, 64, 96)
    layers_per_block: int = 1
    norm_num_groups: int = 16


DRY_RUN_SIZES = AutoencoderSizes(widths=(16, 16, 16, 16))


class GroupNorm(nn.GroupNorm):
    """Keeps its input's dtype also under autocast; the statistics are float32 inside."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> same."""
        with torch.autocast(x_BCHW.device.type, enabled=False):
            weight, bias = self.weight.to(x_BCHW.dtype), self.bias.to(x_BCHW.dtype)
            return F.group_norm(x_BCHW, self.num_groups, weight, bias, self.eps)


class ResnetBlock(nn.Module):
    """Two normed convolutions beside the identity."""

    def __init__(self, num_in: int, num_out: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(num_groups, num_in, eps=EPSILON)
        self.conv1 = nn.Conv2d(num_in, num_out, 3, padding=1)
        self.norm2 = GroupNorm(num_groups, num_out, eps=EPSILON)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(num_in, num_out, 1) if num_in != num_out else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        hidden = self.conv1(F.silu(self.norm1(x_BCHW)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return (x_BCHW if self.conv_shortcut is None else self.conv_shortcut(x_BCHW)) + hidden


class Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, num_channels: int, num_groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(num_groups, num_channels, eps=EPSILON)
        self.to_q = nn.Linear(num_channels, num_channels)
        self.to_k = nn.Linear(num_channels, num_channels)
        self.to_v = nn.Linear(num_channels, num_channels)
        self.to_out = nn.ModuleList([nn.Linear(num_channels, num_channels)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> same."""
        tokens = self.group_norm(x_BCHW).flatten(2).transpose(1, 2)
        q, k, v = (layer(tokens)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        mixed = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x_BCHW + mixed.transpose(1, 2).reshape(x_BCHW.shape)


class MiddleBlock(nn.Module):
    """Resnet, attention, resnet."""

    def __init__(self, num_channels: int, num_groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(num_channels, num_groups)])
        self.resnets = nn.ModuleList(
            ResnetBlock(num_channels, num_channels, num_groups) for _ in range(2)
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> same."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x_BCHW)))


class Downsample(nn.Module):
    """Halves height and width; pads right and below only, as Diffusers does."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_channels, num_channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_channels, num_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Resolution(nn.Module):
    """The resnets of one resolution, and the change to the next one, if any."""

    def __init__(
        self, num_in: int, num_out: int, num_layers: int, num_groups: int, resampler: str | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(num_in if index == 0 else num_out, num_out, num_groups)
            for index in range(num_layers)
        )
        if resampler is not None:
            kind = Downsample if resampler == "downsamplers" else Upsample
            self.add_module(resampler, nn.ModuleList([kind(num_out)]))
        self.resampler = resampler

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        for resnet in self.resnets:
            x_BCHW = resnet(x_BCHW)
        if self.resampler is None:
            return x_BCHW
        return self.get_submodule(f"{self.resampler}.0")(x_BCHW)


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> mean and log-variance (B, 2 * Z, H/8, W/8)."""

    def __init__(self, sizes: AutoencoderSizes) -> None:
        super().__init__()
        widths, groups = sizes.widths, sizes.norm_num_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Resolution(
                widths[max(index - 1, 0)],
                width,
                sizes.layers_per_block,
                groups,
                "downsamplers" if index < len(widths) - 1 else None,
            )
            for index, width in enumerate(widths)
        )
        self.mid_block = MiddleBlock(widths[-1], groups)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], 2 * LATENT_CHANNELS, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2 * Z, H/8, W/8)."""
        hidden = self.conv_in(x_BCHW)
        for block in self.down_blocks:
            hidden = block(hidden)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(hidden))))


class Decoder(nn.Module):
    """Latents (B, Z, H/8, W/8) -> image (B, 3, H, W)."""

    def __init__(self, sizes: AutoencoderSizes) -> None:
        super().__init__()
        widths, groups = sizes.widths[::-1], sizes.norm_num_groups
        self.conv_in = nn.Conv2d(LATENT_CHANNELS, widths[0], 3, padding=1)
        self.mid_block = MiddleBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Resolution(
                widths[max(index - 1, 0)],
                width,
                sizes.layers_per_block + 1,
                groups,
                "upsamplers" if index < len(widths) - 1 else None,
            )
            for index, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        """(B, Z, H/8, W/8) -> (B, 3, H, W)."""
        hidden = self.mid_block(self.conv_in(z_BCHW))
        for block in self.up_blocks:
            hidden = block(hidden)
        return self.conv_out(F.silu(self.conv_norm_out(hidden)))


class Autoencoder(nn.Module):
    """Encoder and decoder under Diffusers' names."""

    def __init__(self, sizes: AutoencoderSizes) -> None:
        super().__init__()
        self.encoder = Encoder(sizes)
        self.decoder = Decoder(sizes)

    def moments(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents: (B, 3, H, W) -> two of (B, Z, H/8, W/8) float32."""
        mean, log_variance = self.encoder(x_BCHW).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)
