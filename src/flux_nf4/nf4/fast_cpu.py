"""`reference.quantize` for bfloat16 on a CPU, bit for bit, in 4 passes where that takes 14.

A bfloat16 has 7 bits behind the point, and so has the absmax of a block of them. Scaling by the
reciprocal rounds mantissas and adds exponents, so the code of a value follows from its sign, the
absmax's 7 bits, and the difference between the bits of both magnitudes as integers: an index into
a table of 8 MB, of which a few hundred bytes for each of the 128 mantissas are ever looked at. It
is filled by the reference.

Exponents at either end, where float32 has fewer digits, are the reference's to do.

Shape letters, in this module only:
    G  blocks               P  bytes, G*S / 2
    S  block size           V  values of one chunk, flat
"""

from __future__ import annotations

import sys
from functools import cache

import torch
from torch import Tensor

from flux_nf4.nf4.reference import nearest_codes

# Values at a time: indices of 1 MiB, and all else, stay within a core's cache.
_CHUNK = 2**18

_NUM_MANTISSAS = 2**7
_NUM_DIFFERENCES = 2**16  # of the bits of a value, sign included, and the magnitude of its absmax
# Below this share of absmax, 2**-16, every value is nearest to zero.
_FAR = 16 * _NUM_MANTISSAS
# Magnitudes, as bits, within which no reciprocal, and no value that is not _FAR, is subnormal.
_LOWEST, _HIGHEST = _FAR + _NUM_MANTISSAS, 0x7E00


def quantize_blocks(w_GS: Tensor) -> tuple[Tensor, Tensor] | None:
    """NF4 codes and absmax of blocks of bfloat16; None where the reference must do it.

    (G, S) bfloat16 -> codes (P,) uint8, absmax (G,) float32.
    """
    if sys.byteorder != "little":
        return None
    num_blocks, block_size = w_GS.shape
    codes_P = torch.empty(w_GS.numel() // 2, dtype=torch.uint8, device="cpu")
    absmax_G = torch.empty(num_blocks, dtype=torch.int32, device="cpu")
    step = _CHUNK // block_size
    for start in range(0, num_blocks, step):
        bits_GS = w_GS[start : start + step].contiguous().view(torch.int16)
        absmax_bits_G = (bits_GS & 0x7FFF).amax(dim=1).int()
        is_zero_G = absmax_bits_G == 0
        is_safe_G = (absmax_bits_G >= _LOWEST) & (absmax_bits_G <= _HIGHEST) | is_zero_G
        if not is_safe_G.all():
            return None
        stop = start + len(bits_GS)
        absmax_G[start:stop] = absmax_bits_G << 16
        # Zeros have no absmax: far from any, they become zeros.
        absmax_bits_G[is_zero_G] = _HIGHEST
        codes_V = _codes(bits_GS, absmax_bits_G)
        _pack(codes_V, codes_P[start * block_size // 2 : stop * block_size // 2])
    return codes_P, absmax_G.view(torch.float32)


def _codes(bits_GS: Tensor, absmax_bits_G: Tensor) -> Tensor:
    """Codes (V,) uint8."""
    row_G = (absmax_bits_G & (_NUM_MANTISSAS - 1)) * _NUM_DIFFERENCES
    first_G = row_G + (_NUM_DIFFERENCES - 1) - absmax_bits_G
    return _table().index_select(0, (bits_GS + first_G[:, None]).view(-1))


def _pack(codes_V: Tensor, codes_P: Tensor) -> None:
    """Two codes a byte, the first in the high nibble: in the upper half of 16 bits x 0x1001."""
    codes_P.copy_(codes_V.view(torch.int16).mul_(0x1001).bitwise_right_shift_(8))


@cache
def _table() -> Tensor:
    """The code of every difference of bits, for every mantissa of absmax.

    () -> (128 * 65536,) uint8. A row ends with the value that equals its absmax; a difference d
    lies d before it, and with the sign bit another 32768 before that.
    """
    mantissas = torch.arange(_NUM_MANTISSAS, dtype=torch.int32, device="cpu")
    absmax_bits = (127 << 7) + mantissas[:, None]
    magnitudes = absmax_bits - torch.arange(_FAR, dtype=torch.int32, device="cpu")
    scale = 1.0 / (absmax_bits << 16).view(torch.float32)
    code_of_zero = nearest_codes(torch.zeros(1, device="cpu"), "nf4")
    table = code_of_zero.repeat(_NUM_MANTISSAS, _NUM_DIFFERENCES)
    for sign, last in ((1, _NUM_DIFFERENCES), (-1, _NUM_DIFFERENCES // 2)):
        scaled = (sign * (magnitudes << 16).view(torch.float32) * scale).clamp_(-1, 1)
        codes = nearest_codes(scaled.view(-1), "nf4").view(scaled.shape)
        table[:, last - _FAR : last] = codes.flip(1)
    return table.view(-1)
