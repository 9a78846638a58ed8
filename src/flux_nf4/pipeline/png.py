"""PNG chunks: text into a file, and back out of any file, however hostile.

Reading walks the chunks and never decodes a pixel, so a picture of any size costs nothing; what
it keeps is bounded. Format: PNG specification, third edition (W3C), sections 5 and 11.3.3.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from flux_nf4.errors import FormatError, InputError
from flux_nf4.formats.atomic import atomic_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_TEXT_BYTES = 4 * 2**20  # of all texts of one file together, decompressed
MAX_CHUNKS = 100_000
_KEPT = (b"IHDR", b"tEXt", b"zTXt", b"iTXt")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageHeader:
    """What an image file says of itself: its size in pixels, and the first text of each keyword."""

    format: Literal["PNG", "JPEG", "WEBP"]
    width: int
    height: int
    is_animated: bool
    texts: Mapping[str, str]


def write_png(path: str | Path, image: Image, texts: Mapping[str, str]) -> None:
    """Save an image with its texts; the file is there whole, or as it was before.

    Raises:
        InputError: the name does not end in `.png`.
        DiskError: no such folder, no permission, no space.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise InputError(f"`{path}` does not end in `.png`, the one format that is written")
    with atomic_file(path) as file:
        save_png(file, image, texts)


def save_png(file: BinaryIO, image: Image, texts: Mapping[str, str]) -> None:
    """Write an RGB image with its texts.

    A1111's text goes into `tEXt` where Latin-1 can hold it and into `iTXt` otherwise, as Pillow
    and so A1111 do.
    """
    from flux_nf4.pipeline.png_encoder import compress_pixels

    file.write(SIGNATURE)
    _write_chunk(file, b"IHDR", struct.pack(">IIBBBBB", *image.size, 8, 2, 0, 0, 0))
    for keyword, text in texts.items():
        _write_chunk(file, *_encode_text(keyword, text))
    _write_chunk(file, b"IDAT", compress_pixels(image))
    _write_chunk(file, b"IEND", b"")


def _encode_text(keyword: str, text: str) -> tuple[bytes, bytes]:
    name = keyword.encode("latin-1")
    if keyword == "parameters":
        with contextlib.suppress(UnicodeEncodeError):
            return b"tEXt", name + b"\0" + text.encode("latin-1")
    return b"iTXt", name + bytes(5) + text.encode()  # not compressed, of no language


def _write_chunk(file: BinaryIO, kind: bytes, body: bytes) -> None:
    checksum = zlib.crc32(body, zlib.crc32(kind))
    file.write(b"".join([struct.pack(">I", len(body)), kind, body, struct.pack(">I", checksum)]))


def read_png_header(file: BinaryIO, name: str) -> ImageHeader:
    """Read the size and the texts of a PNG from its start; errors call it `name`.

    Raises:
        FormatError: it is not a PNG, cut short, damaged, or its texts are beyond all measure.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(8) != SIGNATURE:
        raise FormatError(f"{name} is not a PNG")
    dimensions: tuple[int, int] | None = None
    is_animated = False
    texts: dict[str, str] = {}
    budget = MAX_TEXT_BYTES
    for _ in range(MAX_CHUNKS):
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if len(head) < 8 or file.tell() + length + 4 > size:
            raise FormatError(f"{name} is cut short")
        if kind == b"IEND":
            break
        is_animated |= kind == b"acTL"
        if kind not in _KEPT:
            file.seek(length + 4, os.SEEK_CUR)
            continue
        body = _checked_body(file, kind, length, budget, name)
        if kind == b"IHDR":
            dimensions = _dimensions(body, name)
            continue
        keyword, text = _decode_text(kind, body, budget, name)
        budget -= len(body) + len(text)
        texts.setdefault(keyword, text)
    else:
        raise FormatError(f"{name} has more than {MAX_CHUNKS} chunks")
    if dimensions is None:
        raise FormatError(f"{name} does not say how large it is")
    width, height = dimensions
    return ImageHeader(
        format="PNG", width=width, height=height, is_animated=is_animated, texts=texts
    )


def _checked_body(file: BinaryIO, kind: bytes, length: int, budget: int, name: str) -> bytes:
    if length > budget:
        raise FormatError(f"{name} holds more than {MAX_TEXT_BYTES} bytes of text")
    body = file.read(length)
    if zlib.crc32(kind + body) != int.from_bytes(file.read(4), "big"):
        raise FormatError(f"{name} is damaged: the checksum of a {kind.decode()} chunk is wrong")
    return body


def _dimensions(body: bytes, name: str) -> tuple[int, int]:
    width, height = int.from_bytes(body[:4], "big"), int.from_bytes(body[4:8], "big")
    if len(body) != 13 or not width or not height:
        raise FormatError(f"{name} does not say how large it is")
    return width, height


def _decode_text(kind: bytes, body: bytes, budget: int, name: str) -> tuple[str, str]:
    keyword, separator, rest = body.partition(b"\0")
    if not separator or not 1 <= len(keyword) <= 79:
        raise FormatError(f"{name} is damaged: a {kind.decode()} chunk has no keyword")
    is_compressed = kind == b"zTXt"
    if is_compressed:
        rest = rest[1:]  # the method: there is only one
    elif kind == b"iTXt":
        is_compressed = rest[:1] == b"\1"
        _, _, rest = rest[2:].partition(b"\0")  # flag, method, language
        _, _, rest = rest.partition(b"\0")  # translated keyword
    if is_compressed:
        rest = _decompress(rest, budget, name)
    encoding = "utf-8" if kind == b"iTXt" else "latin-1"
    try:
        return keyword.decode("latin-1"), rest.decode(encoding)
    except UnicodeDecodeError as error:
        raise FormatError(f"{name} is damaged: a text is not {encoding}") from error


def _decompress(data: bytes, budget: int, name: str) -> bytes:
    decompressor = zlib.decompressobj()
    try:
        text = decompressor.decompress(data, budget)
    except zlib.error as error:
        raise FormatError(f"{name} is damaged: a compressed text does not unpack") from error
    if not decompressor.eof:
        raise FormatError(
            f"{name} holds a text that is cut short, or that unpacks beyond all measure"
        )
    return text
