"""An image to start from, and a mask, as the denoise loop reads them.

Equal to Diffusers' FluxImg2ImgPipeline and FluxInpaintPipeline where the image has the drawing's
shape (they stretch it; here it keeps its shape and is cropped). As there, the latents are a sample
of what the encoder gives, drawn before the noise from the same generator, and the mask of a latent
is that of its first pixel. Unlike there, pixels outside the mask are put back as they were.

Shape letters, in this module only:
    B  batch    L  image tokens    D  token channels    H, W  height and width of the image
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import ImageOps
from PIL.Image import Resampling

from flux_nf4.pipeline.conditioning import require_finite
from flux_nf4.pipeline.image_file import to_eight_bits, to_rgb
from flux_nf4.pipeline.sampling import LATENT_CHANNELS, PIXELS_PER_LATENT, pack

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from flux_nf4.pipeline.load import Model
    from flux_nf4.pipeline.request import GenerationRequest

WHITE = 128  # and above: drawn anew


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SourceImage:
    """A request's image: mean and deviation of its latents (1, L, D), and its pixels (1, 3, H, W).

    Of a mask, both for the latents (1, L, D) and for the pixels (1, 1, H, W): what is drawn anew is
    1, the rest 0. Pixels are in [0, 1].
    """

    mean: Tensor
    deviation: Tensor
    pixels: Tensor
    latent_mask: Tensor | None = None
    pixel_mask: Tensor | None = None

    def sample(self, noise_BLD: Tensor | None) -> Tensor:
        """The image's latents (B, L, D) as the noise draws them; without noise their mean."""
        if noise_BLD is None:
            return self.mean
        return self.mean + self.deviation * noise_BLD.to(self.mean)

    def paste(self, images_B3HW: Tensor) -> Tensor:
        """Put back the image's own pixels outside the mask, exactly; in [0, 1]."""
        if self.pixel_mask is None:
            return images_B3HW
        return torch.where(self.pixel_mask > 0, images_B3HW, self.pixels)


def encode_source(model: Model, image: Image, request: GenerationRequest) -> SourceImage:
    """The image of a request, and its mask, scaled, cropped and encoded.

    Raises:
        NumericalError: the encoder gave NaN or infinity.
    """
    image = to_rgb(ImageOps.exif_transpose(image))
    pixels_13HW = _to_tensor(_fit(image, request)).to(model.device)
    with model.memory.phase("decode"):  # of one network with the encoder
        mean, deviation = model.autoencoder.encode(2 * pixels_13HW - 1)
        require_finite(mean, "encode")
        require_finite(deviation, "encode")
    source = SourceImage(mean=pack(mean), deviation=pack(deviation), pixels=pixels_13HW)
    if request.mask_image is None:
        return source
    mask = to_eight_bits(ImageOps.exif_transpose(request.mask_image))
    if mask.has_transparency_data:  # it says nothing here, and Pillow warns of some of its forms
        mask = mask.convert("RGBA")
    is_white = _fit(mask.convert("L"), request).point(lambda level: 255 * (level >= WHITE))
    mask_11HW = _to_tensor(is_white).to(model.device)
    mask_of_latents = mask_11HW[..., ::PIXELS_PER_LATENT, ::PIXELS_PER_LATENT]
    latent_mask = pack(mask_of_latents.expand(-1, LATENT_CHANNELS, -1, -1))
    return dataclasses.replace(source, latent_mask=latent_mask, pixel_mask=mask_11HW)


def _fit(image: Image, request: GenerationRequest) -> Image:
    """Scaled to cover the drawing, and cropped around the middle."""
    return ImageOps.fit(image, (request.width, request.height), Resampling.LANCZOS)


def _to_tensor(image: Image) -> Tensor:
    """(H, W) or (H, W, 3) of 8 bits -> (1, 1 or 3, H, W) float32 in [0, 1]."""
    levels = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(levels.reshape(*levels.shape[:2], -1)).permute(2, 0, 1)[None]
