"""The VAE in training: the package's own network, with norms that suit autocast.

Sixteen latent channels at an eighth of the size, no quant convolutions, as in FLUX.1; only the
widths are smaller.

Shape letters, in this module only:
    B  batch    C  channels    H, W  height and width    Z  latent channels
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_nf4.model.vae import Vae, VaeConfig

LATENT_CHANNELS = 16
SIZES = VaeConfig(
    widths=(32, 48, 64, 96), num_resnets=1, latent_channels=LATENT_CHANNELS, norm_groups=16
)
DRY_RUN_SIZES = dataclasses.replace(SIZES, widths=(16, 16, 16, 16))


class GroupNorm(nn.GroupNorm):
    """Keeps its input's dtype also under autocast; the statistics are float32 inside."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> same."""
        with torch.autocast(x_BCHW.device.type, enabled=False):
            weight, bias = self.weight.to(x_BCHW.dtype), self.bias.to(x_BCHW.dtype)
            return F.group_norm(x_BCHW, self.num_groups, weight, bias, self.eps)


class Autoencoder(Vae):
    """Encoder and decoder under Diffusers' names."""

    def __init__(self, sizes: VaeConfig) -> None:
        super().__init__(sizes)
        for module in list(self.modules()):
            for name, norm in list(module.named_children()):
                if isinstance(norm, nn.GroupNorm):
                    kept = GroupNorm(norm.num_groups, norm.num_channels, eps=norm.eps)
                    setattr(module, name, kept)

    def moments(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents: (B, 3, H, W) -> two of (B, Z, H/8, W/8) float32."""
        mean, log_variance = self.encode(x_BCHW).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)
