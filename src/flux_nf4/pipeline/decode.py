"""From latents to pictures: the finished image, and a small preview of an unfinished one.

Shape letters, in this module only:
    B  batch    L  image tokens    D  token channels    C  latent channels
    H, W  height and width, of the latent or the image
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from PIL import Image

from flux_nf4.pipeline.conditioning import require_finite
from flux_nf4.pipeline.sampling import unpack

if TYPE_CHECKING:
    from torch import Tensor

    from flux_nf4.pipeline.image_input import SourceImage
    from flux_nf4.pipeline.load import Model

PREVIEW_SIDE = 256  # pixels, the longer one


def decode_latents(
    model: Model, tokens_BLD: Tensor, width: int, height: int, source: SourceImage | None = None
) -> Tensor:
    """(B, L, D) packed latents -> images (B, 3, H, W) float32 in [0, 1], on the model's device.

    One image at a time: the VAE's activations are the largest of the whole way. Outside a mask the
    pixels are those of the `source`.

    Raises:
        NumericalError: the VAE gave NaN or infinity.
    """
    latents_BCHW = unpack(tokens_BLD, width, height)
    with model.memory.phase("decode"):
        images = torch.cat([_decode(model, latents_1CHW) for latents_1CHW in latents_BCHW.split(1)])
    return images if source is None else source.paste(images)


def _decode(model: Model, latents_1CHW: Tensor) -> Tensor:
    images = model.autoencoder.decode(latents_1CHW.to(model.dtype)).float()
    require_finite(images, "decode")
    return (images / 2 + 0.5).clamp(0, 1)


def to_pictures(images_B3HW: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> one 8-bit picture each, rounded to nearest as Diffusers does."""
    bytes_BHW3 = (images_B3HW * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in bytes_BHW3]


def preview(model: Model, tokens_BLD: Tensor, width: int, height: int) -> Image.Image:
    """A blurred picture of the first image's latents, its longer side at most 256 pixels.

    Its colours are a linear map of the latents: decoding would take as long as several steps.
    """
    latents_1CHW = unpack(tokens_BLD[:1], width, height)
    factor = min(1.0, PREVIEW_SIDE / max(width, height))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    colours = (model.autoencoder.colours(latents_1CHW) / 2 + 0.5).clamp(0, 1)
    return to_pictures(colours)[0].resize(size, Image.Resampling.BICUBIC)
