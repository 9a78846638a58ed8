"""`--image`, `--mask` and `--strength`: what to start from, read before the model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flux_nf4.cli.paths import path_of
from flux_nf4.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from flux_nf4.cli.generate import GenerateOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The image to start from, its mask and the strength, as `GenerationRequest` has them."""

    image: Image | None
    mask_image: Image | None
    strength: float


def read_source(options: GenerateOptions) -> Source:
    """Read the files that the options name.

    Raises:
        InputError: a file cannot be read, the mask does not lie on the image, or there is a mask
            or a strength and no image.
        FormatError: a file is no image, damaged, or too large.
    """
    from flux_nf4.pipeline.image_file import check_mask, open_image
    from flux_nf4.pipeline.limits import DEFAULT_STRENGTH

    if options.image is None:
        for name, value in (("--mask", options.mask), ("--strength", options.strength)):
            if value is not None:
                raise InputError(
                    f"`{name}` is for drawing from an image, and none is given",
                    hint="name the image with `--image FILE`",
                )
    image, mask_image = (
        None if name is None else open_image(path_of(name))
        for name in (options.image, options.mask)
    )
    if image is not None and mask_image is not None:
        check_mask(mask_image, image)
    return Source(image=image, mask_image=mask_image, strength=options.strength or DEFAULT_STRENGTH)
