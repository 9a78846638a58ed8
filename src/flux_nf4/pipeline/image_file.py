"""Image files that strangers made, opened: their size is known to be sane before they are decoded.

What comes out is upright and loaded, so nothing more can go wrong with it.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from flux_nf4.errors import FormatError, InputError
from flux_nf4.pipeline.image_header import read_header

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 100_000_000  # more than most cameras have; decoded, 400 MB at the most
_MAX_FILE_BYTES = 2**29
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # EXIF 2.3, 4.6.4
_MAX_SHAPE_ERROR = 0.02  # of a mask's width to height, against the image's: sizes are rounded
# What Pillow's decoders raise on damaged data, as far as fuzzing has shown.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, struct.error)


def open_image(path: str | Path) -> Image.Image:
    """Read a PNG, JPEG or WebP file.

    Raises:
        InputError: there is no such file, or it cannot be read.
        FormatError: it is not such an image, damaged, or larger than 100 megapixels.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise FormatError(f"`{path}` is larger than {_MAX_FILE_BYTES // 2**20} MiB")
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES)  # a device has no end
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the image `{path}`: {reason}") from error
    return decode_image(data, f"`{path}`")


def decode_image(data: bytes, name: str) -> Image.Image:
    """The first picture of a PNG, JPEG or WebP file, turned upright; errors call it `name`.

    Raises:
        FormatError: it is not such an image, damaged, or larger than 100 megapixels.
    """
    import warnings

    from PIL import Image, ImageOps

    header = read_header(io.BytesIO(data), name)
    if header.width * header.height > MAX_PIXELS:
        raise FormatError(
            f"{name} has {header.width} x {header.height} pixels, more than "
            f"{MAX_PIXELS // 10**6} megapixels",
            hint="make it smaller: it is scaled to the size of the drawing anyway",
        )
    try:
        with warnings.catch_warnings(action="ignore"):  # what matters is whether it opens
            image = Image.open(io.BytesIO(data), formats=(header.format,))
            if image.size != (header.width, header.height):
                raise FormatError(f"{name} is damaged: it tells two sizes")
            return ImageOps.exif_transpose(image)
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        # Not in Pillow's words: some tell an address in memory, and this may go to a stranger.
        raise FormatError(f"{name} is damaged: it cannot be decoded") from error


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as the image is to be seen: its EXIF may say that it lies on its side."""
    is_on_its_side = image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
    return (image.height, image.width) if is_on_its_side else image.size


def check_mask(mask: Image.Image, image: Image.Image) -> None:
    """Raises InputError where a mask has another shape than its image; its size is its own."""
    (mask_width, mask_height), (width, height) = upright_size(mask), upright_size(image)
    if abs(mask_width * height / (mask_height * width) - 1) > _MAX_SHAPE_ERROR:
        raise InputError(
            f"the mask of {mask_width} x {mask_height} pixels does not lie on the image of "
            f"{width} x {height}",
            hint="make the mask as large as the image",
        )


def to_eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits scaled to 8, where Pillow would cut off; others as they are."""
    if not image.mode.startswith("I"):
        return image
    return image.convert("I").point(lambda level: level / 256).convert("L")


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: what is transparent becomes white, 16 bits become 8."""
    from PIL import Image

    image = to_eight_bits(image)
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return image.convert("RGB")
