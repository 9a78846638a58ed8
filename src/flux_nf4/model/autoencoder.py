"""FLUX's autoencoder, by way of diffusers: 8 x 8 pixels to 16 channels, and back.

Shape letters, in this module only:
    B  batch    C  latent channels    H, W  latent rows and columns    P, Q  pixel rows and columns
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flux_nf4.errors import FormatError
from flux_nf4.model.assemble import assemble, check_compute_dtype
from flux_nf4.model.sizes import count_blocks, has_any, shape_of

if TYPE_CHECKING:
    from flux_nf4.formats.component import Component
    from flux_nf4.formats.facts import Facts

RGB = 3  # channels of an image


class Autoencoder(nn.Module):
    """Images to the latents that the transformer works on, and back.

    The transformer sees latents shifted and scaled to mean 0 and deviation 1; both directions
    take care of that here.
    """

    def __init__(self, model: Any, *, scaling_factor: float, shift_factor: float) -> None:
        super().__init__()
        self.model = model
        self.scaling_factor = scaling_factor
        self.shift_factor = shift_factor
        self.latent_channels: int = model.config.latent_channels
        self.pixels_per_latent: int = 2 ** (len(model.config.block_out_channels) - 1)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.model.decoder.conv_in.weight.dtype

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> images (B, 3, 8 * H, 8 * W), in the model's dtype.

        The range is about [-1, 1] and is not enforced: a clamp would hide infinity.
        """
        shifted = latents_BCHW.float() / self.scaling_factor + self.shift_factor
        return self.model.decode(shifted.to(self.dtype), return_dict=False)[0]

    def encode(self, images_B3PQ: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, 3, P, Q) in [-1, 1] -> latents (B, C, P / 8, Q / 8) float32.

        The mean of the distribution; with a generator, a sample of it.
        """
        posterior = self.model.encode(images_B3PQ.to(self.dtype), return_dict=False)[0]
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return (latents.float() - self.shift_factor) * self.scaling_factor


def build_autoencoder(
    component: Component, facts: Facts, *, device: torch.device | str, dtype: torch.dtype
) -> Autoencoder:
    """An autoencoder of any size, from entries under Diffusers' names.

    Raises:
        InputError: `dtype` is neither bfloat16 nor float32.
        FormatError: the entries are not those of such an autoencoder.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    check_compute_dtype(dtype)
    num_levels = count_blocks(component, "encoder.down_blocks")
    widths = [
        shape_of(component, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", num_axes=4)[0]
        for i in range(max(num_levels, 1))  # where there are none, the first is what is missing
    ]
    groups = facts.vae_norm_num_groups
    if any(width % groups for width in widths):
        raise FormatError(
            f"the vae in `{component.source}` has levels of {widths} channels, which do not divide "
            f"into {groups} groups"
        )
    with torch.device("meta"):
        model = AutoencoderKL(
            in_channels=RGB,
            out_channels=RGB,
            down_block_types=("DownEncoderBlock2D",) * num_levels,
            up_block_types=("UpDecoderBlock2D",) * num_levels,
            block_out_channels=tuple(widths),
            layers_per_block=count_blocks(component, "encoder.down_blocks.0.resnets"),
            latent_channels=shape_of(component, "decoder.conv_in.weight", num_axes=4)[1],
            norm_num_groups=groups,
            use_quant_conv=has_any(component, "quant_conv."),
            use_post_quant_conv=has_any(component, "post_quant_conv."),
            mid_block_add_attention=has_any(component, "decoder.mid_block.attentions."),
        )
    assemble(model, component, device=device, dtype=dtype)
    return Autoencoder(
        model, scaling_factor=facts.vae_scaling_factor, shift_factor=facts.vae_shift_factor
    ).eval()
