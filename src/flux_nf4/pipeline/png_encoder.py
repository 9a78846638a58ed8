"""The pixels of a PNG, compressed fast: a grainy megapixel in 20 ms on four cores, 46 ms on one.

Pillow takes 110 to 180 ms: it tries five filters on each row, and zlib looks for repeats that such
pictures do not have. Here Paeth's filter takes every row, for 7 % more bytes at most than the best
of the five, and zlib looks for runs alone (`Z_RLE`), but where a sample tells that looking for
repeats pays: in drawings, lettering, gradients without grain. Strips of rows are compressed on
several threads, each on its own. Against Pillow's level 4, of 29 images of every kind none became
more than 9 % larger; the demo model's became 7 % smaller, and photographs stayed the same.
Format: PNG specification, third edition (W3C), sections 9 and 10; RFC 1950; RFC 1951.
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

# All fixed, so that the same image makes the same file anywhere.
_STRIP_BYTES = 2**18  # with a quarter of it, smooth images are 10 % larger
_SAMPLE_BYTES = 2**15  # at the start of each strip; as far back as zlib looks for repeats
_WORTHWHILE = 0.95  # looking for repeats takes four times as long
_RUNS, _REPEATS = (1, zlib.Z_RLE), (4, zlib.Z_DEFAULT_STRATEGY)  # level and strategy
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
    sample = filtered[:_SAMPLE_BYTES]
    repeats = len(_deflate(sample, *_REPEATS)) < _WORTHWHILE * len(_deflate(sample, *_RUNS))
    return filtered, _deflate(filtered, *(_REPEATS if repeats else _RUNS))


def _deflate(data: bytes, level: int, strategy: int) -> bytes:
    compressor = zlib.compressobj(level, wbits=-15, strategy=strategy)
    return compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH)


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
