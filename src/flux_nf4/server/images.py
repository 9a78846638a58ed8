"""Images in and out of the server: checked before they are decoded, written with their settings.

An upload is judged by its content alone, and its size is read from its header before Pillow sees
it: a PNG of 21 KB can hold 179 million pixels, half a gigabyte. Everything here is work for a
thread (`asyncio.to_thread`), not for the event loop.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from flux_nf4.errors import FormatError, InputError
from flux_nf4.pipeline.image_file import decode_image
from flux_nf4.pipeline.image_header import read_header
from flux_nf4.pipeline.image_metadata import exif_and_xmp, png_texts, read_image
from flux_nf4.pipeline.png import save_png

if TYPE_CHECKING:
    from flux_nf4.pipeline.image_metadata import ImageSettings

ImageFormat: TypeAlias = Literal["png", "jpeg", "webp"]

_DEFAULT_QUALITY = 90
_PREVIEW_QUALITY = 75


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadedImage:
    """An image that can be decoded: the bytes as they came, and its size in pixels, upright."""

    data: bytes
    width: int
    height: int


def check_upload(data: bytes, *, max_pixels: int) -> UploadedImage:
    """Accept a still PNG, JPEG or WebP image that decodes to its end.

    Raises:
        InputError: it is something else, moves, has more than `max_pixels`, or is damaged.
    """
    try:
        header = read_header(io.BytesIO(data), "the image")
        if header.is_animated:
            raise InputError("the image is an animation", hint="send one frame of it")
        num_pixels = header.width * header.height
        if num_pixels > max_pixels:
            raise InputError(
                f"the image has {header.width} x {header.height} pixels, more than {max_pixels}",
                hint="make it smaller before you send it",
            )
        # To its end, so that no damage shows up later.
        image = decode_image(data, "the image")
    except FormatError as error:
        raise InputError(error.message, hint="send a PNG, JPEG or WebP file") from error
    return UploadedImage(data=data, width=image.width, height=image.height)


def encode_png(rgb: bytes, width: int, height: int, settings: ImageSettings) -> bytes:
    """A PNG of `width` x `height` pixels, three bytes each, with its settings in it."""
    from PIL import Image

    file = io.BytesIO()
    save_png(file, Image.frombytes("RGB", (width, height), rgb), png_texts(settings))
    return file.getvalue()


def transcode(png: bytes, format: ImageFormat, quality: int | None = None) -> bytes:
    """The same image and the same metadata in another format; `quality` is 0 to 100.

    A PNG loses nothing and has no quality: it stays as it is.
    """
    if format == "png":
        return png
    from PIL import Image

    exif, xmp = exif_and_xmp(read_image(png), is_jpeg=format == "jpeg")
    file = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(
        file,
        format=format,
        quality=_DEFAULT_QUALITY if quality is None else quality,
        exif=exif,
        xmp=xmp,
    )
    return file.getvalue()


def encode_preview(rgb: bytes, width: int, height: int) -> bytes:
    """A small JPEG of `width` x `height` pixels, three bytes each, without metadata."""
    from PIL import Image

    file = io.BytesIO()
    Image.frombytes("RGB", (width, height), rgb).save(file, "JPEG", quality=_PREVIEW_QUALITY)
    return file.getvalue()
