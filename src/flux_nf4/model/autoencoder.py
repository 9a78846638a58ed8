"""FLUX's autoencoder: 8 x 8 pixels to 16 channels, and back.

Shape letters, in this module only:
    B  batch    C  latent channels    H, W  latent rows and columns    P, Q  pixel rows and columns
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_nf4.errors import FormatError
from flux_nf4.formats.facts import FLUX_1_DEV
from flux_nf4.model.assemble import assemble, check_compute_dtype
from flux_nf4.model.sizes import count_blocks, shape_of
from flux_nf4.model.strips import decode_in_strips, encode_in_strips
from flux_nf4.model.vae import RGB, Vae, VaeConfig

if TYPE_CHECKING:
    from flux_nf4.formats.component import Component
    from flux_nf4.formats.facts import Facts

LOG_VARIANCES = (-30.0, 20.0)  # what the encoder's are held to
FLUX_1_WIDTHS = (128, 256, 512, 512)  # SD3's VAE has them too, and other factors
# What each latent channel of FLUX.1's VAE adds to red, green and blue, and the offset: a linear fit
# that ComfyUI (comfy/latent_formats.py, `Flux`) and stable-diffusion.cpp both state.
FLUX_1_COLOURS = (
    (-0.0346, 0.0244, 0.0681), (0.0034, 0.0210, 0.0687), (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.0160, 0.0617), (0.0859, 0.0721, 0.0329), (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915), (-0.0236, -0.0185, -0.0259), (-0.0245, 0.0250, 0.1180),
    (0.1008, 0.0755, -0.0421), (-0.0515, 0.0201, 0.0011), (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749), (-0.1264, -0.0522, -0.1103), (-0.0280, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778), (-0.0329, -0.0718, -0.0851),
)  # fmt: skip


class Autoencoder(nn.Module):
    """Images to the latents that the transformer works on, and back.

    The transformer sees latents shifted and scaled to mean 0 and deviation 1; both directions
    take care of that here.
    """

    def __init__(self, model: Vae, *, scaling_factor: float, shift_factor: float) -> None:
        super().__init__()
        self.model = model
        self.scaling_factor = scaling_factor
        self.shift_factor = shift_factor
        # Less memory, for a little time: what a GPU's memory is planned with.
        self.is_in_strips = False
        self.latent_channels = model.config.latent_channels
        self.pixels_per_latent = 2 ** (len(model.config.widths) - 1)
        # Each latent channel's part in red, green and blue, and last what no channel gives.
        self._colour_map: Tensor | None = None
        own = FLUX_1_DEV.vae_scaling_factor, FLUX_1_DEV.vae_shift_factor
        if (scaling_factor, shift_factor) == own and model.config.widths == FLUX_1_WIDTHS:
            self._colour_map = torch.tensor(FLUX_1_COLOURS)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.model.decoder.conv_in.weight.dtype

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> images (B, 3, 8 * H, 8 * W), in the model's dtype.

        The range is about [-1, 1] and is not enforced: a clamp would hide infinity.
        """
        shifted = latents_BCHW.float() / self.scaling_factor + self.shift_factor
        if self.is_in_strips:
            pieces = shifted.to(self.dtype).split(1)
            return torch.cat([decode_in_strips(self.model, piece) for piece in pieces])
        return self.model.decode(shifted.to(self.dtype))

    def encode(self, images_B3PQ: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, P, Q) in [-1, 1] -> mean and deviation, (B, C, P / 8, Q / 8) float32 each.

        The encoder gives a distribution; `mean + deviation * noise` is a sample of it.
        """
        images_B3PQ = images_B3PQ.to(self.dtype)
        if self.is_in_strips:
            pieces = images_B3PQ.split(1)
            moments = torch.cat([encode_in_strips(self.model, piece) for piece in pieces])
        else:
            moments = self.model.encode(images_B3PQ)
        mean, log_variance = moments.chunk(2, dim=1)
        deviation = torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCES)).float()
        mean = (mean.float() - self.shift_factor) * self.scaling_factor
        return mean, deviation * self.scaling_factor

    @property
    def knows_colours(self) -> bool:
        """Whether `colours` is a matter of its input alone: else the encoder runs first."""
        return self._colour_map is not None

    def colours(self, latents_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) float32 -> about the colour of each latent's pixels, (B, 3, H, W).

        In [-1, 1], not enforced. Costs next to nothing: it is one linear map.
        """
        if self._colour_map is None:
            self._colour_map = self._fit_colours()
        *factors_C3, offset_3 = self._colour_map.to(latents_BCHW)
        return F.conv2d(latents_BCHW, torch.stack(factors_C3, 1)[..., None, None], offset_3)

    def _fit_colours(self) -> Tensor:
        """Least squares over one image of squares that are black, white, or of a pure colour.

        Of the images tried (squares or gradients of any colour, noise) this gave the demo model's
        pictures best: an error of 12 levels of 255 in the mean, where no linear map has below 10.
        """
        sides = torch.randint(2, (1, RGB, 12, 12), generator=torch.Generator().manual_seed(0))
        images = F.interpolate(2.0 * sides - 1, (256, 256))
        means, _ = self.encode(images.to(self.model.decoder.conv_in.weight.device))
        latents = F.pad(means.cpu().nan_to_num().flatten(2)[0], (0, 0, 0, 1), value=1)
        colours = F.avg_pool2d(images, self.pixels_per_latent).flatten(2)[0]
        return torch.linalg.lstsq(latents.T, colours.T).solution


def build_autoencoder(
    component: Component, facts: Facts, *, device: torch.device | str, dtype: torch.dtype
) -> Autoencoder:
    """An autoencoder of any size, from entries under Diffusers' names.

    Raises:
        InputError: `dtype` is neither bfloat16 nor float32.
        FormatError: the entries are not those of such an autoencoder.
    """
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
    config = VaeConfig(
        widths=tuple(widths),
        num_resnets=count_blocks(component, "encoder.down_blocks.0.resnets"),
        latent_channels=shape_of(component, "decoder.conv_in.weight", num_axes=4)[1],
        norm_groups=groups,
    )
    with torch.device("meta"):
        model = Vae(config)
    assemble(model, component, device=device, dtype=dtype)
    return Autoencoder(
        model, scaling_factor=facts.vae_scaling_factor, shift_factor=facts.vae_shift_factor
    ).eval()
