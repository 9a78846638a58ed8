"""What an image file says of itself, as PNG, JPEG or WebP: decided by content, never by name.

Like the PNG reader this walks the containers' parts and decodes no pixel, so it is safe to ask
before anything else is done with a stranger's file. In JPEG and WebP, A1111's text is the EXIF
`UserComment`. Formats: JPEG, ITU T.81 annex B; WebP container specification (Google); EXIF 2.3
(CIPA DC-008), sections 4.6.2 and 4.6.5; XMP specification, part 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, Literal

from flux_nf4.errors import FormatError
from flux_nf4.pipeline.png import MAX_CHUNKS, SIGNATURE, ImageHeader, read_png_header

if TYPE_CHECKING:
    from collections.abc import Mapping

PARAMETERS_KEY = "parameters"
XMP_KEY = "XML:com.adobe.xmp"
EXIF_POINTER, USER_COMMENT = 0x8769, 0x9286
UNICODE_COMMENT = b"UNICODE\0"
MAX_JPEG_SEGMENT_BYTES = 65_533  # a length of 16 bits, which counts itself
_MAX_PART_BYTES = 2**20  # of the EXIF or XMP of a WebP
_EXIF_PREFIX = b"Exif\0\0"
_XMP_PREFIX = b"http://ns.adobe.com/xap/1.0/\0"
_NO_LENGTH = {0x01, *range(0xD0, 0xD8)}
_SCAN_OR_END = {0xDA, 0xD9}
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def read_header(file: BinaryIO, name: str) -> ImageHeader:
    """Read the size and the texts of an image; errors call it `name`.

    Raises:
        FormatError: it is none of the three formats, cut short, damaged, or beyond all measure.
    """
    file.seek(0)
    start = file.read(12)
    if start.startswith(SIGNATURE):
        return read_png_header(file, name)
    if start.startswith(b"\xff\xd8\xff"):
        return _read_jpeg(file, name)
    if start[:4] == b"RIFF" and start[8:] == b"WEBP":
        return _read_webp(file, name)
    raise FormatError(f"{name} is not a PNG, JPEG or WebP image")


def _read_jpeg(file: BinaryIO, name: str) -> ImageHeader:
    file.seek(2)
    dimensions = (0, 0)
    exif = xmp = b""
    for _ in range(MAX_CHUNKS):
        marker = _next_marker(file)
        if marker in _NO_LENGTH:
            continue
        if marker in _SCAN_OR_END:
            break
        length = int.from_bytes(file.read(2), "big") - 2
        body = file.read(max(length, 0))
        if marker is None or length < 0 or len(body) < length:
            raise FormatError(f"{name} is cut short or damaged")
        if marker in _FRAMES and dimensions == (0, 0):
            dimensions = (int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big"))
        elif marker == 0xE1 and body.startswith(_EXIF_PREFIX):
            exif = exif or body
        elif marker == 0xE1 and body.startswith(_XMP_PREFIX):
            xmp = xmp or body.removeprefix(_XMP_PREFIX)
    return _header("JPEG", dimensions, name, texts=_texts(exif, xmp))


def _next_marker(file: BinaryIO) -> int | None:
    if file.read(1) != b"\xff":
        return None
    while (byte := file.read(1)) == b"\xff":  # any number of these may stand before a marker
        pass
    return byte[0] if byte else None


def _read_webp(file: BinaryIO, name: str) -> ImageHeader:
    dimensions = (0, 0)
    is_animated = False
    parts = {b"EXIF": b"", b"XMP ": b""}
    for _ in range(MAX_CHUNKS):
        head = file.read(8)
        if not head:
            break
        kind, length = head[:4], int.from_bytes(head[4:], "little")
        num_kept = length if kind in parts else min(length, 10)
        if num_kept > _MAX_PART_BYTES:
            raise FormatError(f"{name} holds more than {_MAX_PART_BYTES} bytes of metadata")
        body = file.read(num_kept)
        if len(head) < 8 or len(body) < num_kept:
            raise FormatError(f"{name} is cut short")
        if dimensions == (0, 0):
            dimensions = _webp_dimensions(kind, body)
        is_animated |= kind in (b"ANIM", b"ANMF")
        if kind in parts:
            parts[kind] = parts[kind] or body
        file.seek(length - num_kept + length % 2, 1)
    texts = _texts(parts[b"EXIF"], parts[b"XMP "])
    return _header("WEBP", dimensions, name, texts=texts, is_animated=is_animated)


def _webp_dimensions(kind: bytes, body: bytes) -> tuple[int, int]:
    """The size in the first part of a WebP, from that part's first ten bytes."""
    if len(body) < 10 and kind != b"VP8L":
        return (0, 0)
    if kind == b"VP8X":
        return (
            int.from_bytes(body[4:7], "little") + 1,
            int.from_bytes(body[7:10], "little") + 1,
        )
    if kind == b"VP8 ":
        return (
            int.from_bytes(body[6:8], "little") & 0x3FFF,
            int.from_bytes(body[8:10], "little") & 0x3FFF,
        )
    if kind == b"VP8L" and len(body) >= 5:
        bits = int.from_bytes(body[1:5], "little")
        return ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    return (0, 0)


def _header(
    form: Literal["JPEG", "WEBP"],
    dimensions: tuple[int, int],
    name: str,
    *,
    texts: Mapping[str, str],
    is_animated: bool = False,
) -> ImageHeader:
    width, height = dimensions
    if not width or not height:
        raise FormatError(f"{name} does not say how large it is")
    return ImageHeader(
        format=form, width=width, height=height, is_animated=is_animated, texts=texts
    )


def _texts(exif: bytes, xmp: bytes) -> dict[str, str]:
    found = {
        PARAMETERS_KEY: user_comment(exif.removeprefix(_EXIF_PREFIX)),
        XMP_KEY: xmp.decode(errors="replace"),
    }
    return {keyword: text for keyword, text in found.items() if text}


def user_comment(exif: bytes) -> str:
    """The comment in an EXIF block; empty where there is none, or nothing sensible.

    Cameras write EXIF of all sorts: what cannot be made out is no reason to refuse a picture.
    """
    is_little = exif.startswith(b"II*\0")
    if not is_little and not exif.startswith(b"MM\0*"):
        return ""
    pointer = _entry(exif, _number(exif[4:8], is_little=is_little), EXIF_POINTER, is_little)
    if pointer is None:
        return ""
    entry = _entry(exif, _number(pointer[8:], is_little=is_little), USER_COMMENT, is_little)
    if entry is None:
        return ""
    length = _number(entry[4:8], is_little=is_little)
    start = _number(entry[8:], is_little=is_little)
    return _decode_comment(exif[start : start + length])


def _entry(exif: bytes, start: int, tag: int, is_little: bool) -> bytes | None:
    """The twelve bytes (tag, type, count, value or offset) of `tag` in the directory at `start`."""
    for index in range(_number(exif[start : start + 2], is_little=is_little)):
        entry = exif[start + 2 + 12 * index :][:12]
        if len(entry) < 12:
            return None
        if _number(entry[:2], is_little=is_little) == tag:
            return entry
    return None


def _number(field: bytes, *, is_little: bool) -> int:
    return int.from_bytes(field, "little" if is_little else "big")


def _decode_comment(comment: bytes) -> str:
    prefix, text = comment[:8], comment[8:]
    if prefix == UNICODE_COMMENT:
        # Nobody says in which byte order: A1111 writes the big end first, others do not. Of the
        # two bytes of a Latin letter, the one that is zero tells.
        is_big = text[0::2].count(0) >= text[1::2].count(0)
        decoded = text.decode("utf-16-be" if is_big else "utf-16-le", errors="replace")
    else:
        known = prefix in (b"ASCII\0\0\0", bytes(8))
        decoded = (text if known else comment).decode(errors="replace")
    return decoded.removeprefix("\ufeff").rstrip("\0 ")
