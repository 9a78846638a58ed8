"""NF4 in plain PyTorch: runs on every device, and is the oracle for every kernel.

Equal to bitsandbytes 0.50.2 on a CPU bit for bit: codes, absmax, nested statistics, and what all
of them decode to. Its rules, read from that version and confirmed by experiment:

- a block is scaled by the reciprocal of its absmax, not divided by it;
- thresholds are the float32 midpoints of neighbouring levels, and a value on one takes the lower;
- absmax is nested by subtracting the mean and rounding to the nearest of 256 levels, after
  rounding to a grid of 2**16 points: its thresholds lie up to 1.6e-5 off the true midpoints.

Tables take the place of a binary search: four times as fast, and about as fast as compiled code.

Shape letters, in this module only:
    N  out features         G  blocks, N*K / S
    K  in features          P  bytes, N*K / 2
    S  block size           V  values of one chunk, flat
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from flux_nf4.errors import InputError
from flux_nf4.nf4.codec import (
    DTYPES,
    NESTED_BLOCK_SIZE,
    NestedAbsmax,
    NF4Weight,
    QuantType,
    check_block_size,
    check_fills_blocks,
    check_quant_type,
    decode_absmax,
    dynamic_map,
    levels,
)

# Values quantised or expanded at a time: float32 temporaries of 4 MiB stay within the caches, and
# a weight of 18432 x 3072 needs no second copy of itself. Divisible by every block size.
_CHUNK = 2**20

# Cells per unit: no two thresholds of either table fall into one cell of 1/512.
_CELLS = 512

# bitsandbytes does not scale by more than this; a block of zeros has no scale of its own.
_SMALLEST_ABSMAX = 1e-38


@torch.no_grad()
def quantize(
    w_NK: Tensor, *, block_size: int = 64, quant_type: QuantType = "nf4", nested: bool = False
) -> NF4Weight:
    """Round every value to the nearest of sixteen levels, block by block.

    (N, K) -> codes (P,) uint8, absmax (G,) float32, or nested.

    Equals bitsandbytes 0.50.2 on a CPU byte for byte. A value exactly between two levels takes
    the lower one; a block of zeros stays zeros. float64 is rounded to float32 first.

    Raises:
        InputError: values that are no floating-point numbers, NaN or infinite; or an unknown
            block size or quant_type.
        ShapeError: no matrix, or one that does not fill whole blocks.
    """
    check_quant_type(quant_type)
    check_block_size(block_size)
    check_fills_blocks(w_NK.shape, block_size)
    if w_NK.dtype not in (*DTYPES, torch.float64):
        raise InputError(f"only floating-point weights can be quantised, not {w_NK.dtype}")
    values = w_NK.detach().reshape(-1)
    num_values = values.numel()
    codes_P = torch.empty(num_values // 2, dtype=torch.uint8, device=values.device)
    absmax_G = torch.empty(num_values // block_size, dtype=torch.float32, device=values.device)
    for start in range(0, num_values, _CHUNK):
        chunk_V = values[start : start + _CHUNK]
        stop = start + chunk_V.numel()
        chunk_G = absmax_G[start // block_size : stop // block_size]
        codes_V = _quantize_chunk(chunk_V, chunk_G, block_size, quant_type, values)
        torch.bitwise_or(codes_V[0::2] << 4, codes_V[1::2], out=codes_P[start // 2 : stop // 2])
    return NF4Weight(
        codes=codes_P,
        absmax=nest_absmax(absmax_G) if nested else absmax_G,
        shape=(w_NK.shape[0], w_NK.shape[1]),
        block_size=block_size,
        quant_type=quant_type,
        dtype=torch.float32 if w_NK.dtype == torch.float64 else w_NK.dtype,
    )


def _quantize_chunk(
    chunk_V: Tensor, absmax_G: Tensor, block_size: int, quant_type: QuantType, values: Tensor
) -> Tensor:
    """Codes (V,) uint8 of one chunk; its absmax is written into `absmax_G`."""
    chunk_GS = chunk_V.float().view(-1, block_size)
    torch.amax(chunk_GS.abs(), dim=1, out=absmax_G)
    if not absmax_G.isfinite().all():
        num_bad = values.numel() - int(values.float().isfinite().sum())
        raise InputError(
            f"{num_bad} of {values.numel()} values are NaN or infinite in float32",
            hint="the file may be damaged: compare its sha256 with the publisher's",
        )
    scale_G1 = (1.0 / absmax_G.clamp(min=_SMALLEST_ABSMAX))[:, None]
    return nearest_codes((chunk_GS * scale_G1).clamp_(-1, 1).view(-1), quant_type)


def nearest_codes(scaled_V: Tensor, quant_type: QuantType) -> Tensor:
    """The code of the level nearest to each value, the lower one of two as near.

    (V,) float32 within [-1, 1] -> (V,) uint8.
    """
    threshold, num_below, code_of_rank = _rounding_tables(quant_type, scaled_V.device)
    cell_V = _cell(scaled_V)
    rank_V = num_below.index_select(0, cell_V).add_(scaled_V > threshold.index_select(0, cell_V))
    return rank_V if quant_type == "nf4" else code_of_rank.index_select(0, rank_V.int())


def _cell(scaled: Tensor) -> Tensor:
    """The cell, 0 to 2 * _CELLS, that a value in [-1, 1] falls into; never falls as x rises."""
    return (scaled * _CELLS).add_(_CELLS).int()


@cache
def _rounding_tables(quant_type: QuantType, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """How to count the thresholds below a value without a search.

    Cell c holds at most one threshold; every value in it lies above `num_below[c]` of the others,
    so its rank among the sorted levels is `num_below[c] + (value > threshold[c])`, exactly.

    () -> threshold (2 * _CELLS + 1,) float32, num_below (same,) uint8, code_of_rank (16,) uint8.
    """
    rising, code_of_rank = levels(quant_type).sort(stable=True)
    midpoints = (rising[:-1] + rising[1:]) / 2
    cell_of_midpoint = _cell(midpoints)
    threshold = torch.full((2 * _CELLS + 1,), torch.inf, device="cpu")
    threshold[cell_of_midpoint.long()] = midpoints
    all_cells = torch.arange(2 * _CELLS + 1, dtype=torch.int32, device="cpu")
    num_below = torch.bucketize(all_cells, cell_of_midpoint).to(torch.uint8)
    return threshold.to(device), num_below.to(device), code_of_rank.to(torch.uint8).to(device)


@torch.no_grad()
def nest_absmax(absmax_G: Tensor) -> NestedAbsmax:
    """Quantise absmax once more, to 8 bits in blocks of 256 around its mean (v1).

    (G,) float32 -> codes (G,) uint8, absmax (ceil(G / 256),) float32, levels (256,).

    Equals bitsandbytes 0.50.2 on a CPU byte for byte, where as many threads share the mean.
    """
    offset = absmax_G.mean()
    num_blocks = -(-absmax_G.numel() // NESTED_BLOCK_SIZE)
    centred = absmax_G.new_zeros(num_blocks * NESTED_BLOCK_SIZE)
    centred[: absmax_G.numel()] = absmax_G - offset
    centred = centred.view(num_blocks, NESTED_BLOCK_SIZE)
    nested_absmax = centred.abs().amax(dim=1)
    scaled = (centred * (1.0 / nested_absmax)[:, None]).clamp_(-1, 1)
    # A block without a scale is 0 x infinity; bitsandbytes gives it code 0, the first grid point.
    scaled = scaled.nan_to_num_(nan=-1.0)
    # One fused multiply-add and a truncation, as its compiler makes of it: float64 holds the
    # product and the sum exactly, and the float32 cast rounds once.
    position = ((scaled + 1) * 0.5).double().mul_(2**16 - 1).add_(0.5).float().int()
    map_levels = dynamic_map()
    grid = torch.arange(2**16, dtype=torch.float32, device="cpu") * 2 / (2**16 - 1) - 1
    code_of_position = torch.bucketize(grid, (map_levels[:-1] + map_levels[1:]) / 2)
    codes = code_of_position.to(torch.uint8).to(absmax_G.device)[position.view(-1)]
    return NestedAbsmax(
        codes=codes[: absmax_G.numel()].contiguous(),
        absmax=nested_absmax,
        levels=map_levels.to(absmax_G.device),
        offset=float(offset),
    )


def dequantize(weight: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix that the codes stand for; by default in `weight.dtype`.

    codes (P,), absmax (G,) -> (N, K).

    Every value is level x absmax in float32, rounded once to `dtype`: bitsandbytes' result, bit
    for bit. float64 widens the float32 value.

    Raises:
        InputError: `dtype` is not a floating-point type of 16 bits or more.
    """
    out_dtype = weight.dtype if dtype is None else dtype
    check_out_dtype(out_dtype)
    return expand(
        weight.codes,
        weight.float_absmax(),
        weight.shape,
        weight.block_size,
        weight.quant_type,
        out_dtype,
    )


def check_out_dtype(dtype: torch.dtype) -> None:
    """Raises InputError unless weights can be expanded to `dtype`."""
    if dtype not in (*DTYPES, torch.float64):
        raise InputError(f"weights expand to a floating-point type of 16 bits or more, not {dtype}")


def expand(
    codes_P: Tensor,
    absmax_G: Tensor,
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """`dequantize` on bare tensors, which must fit each other.

    codes (P,) uint8, absmax (G,) float32 -> (N, K) `dtype`.
    """
    table = _pair_table(quant_type, codes_P.device)
    if 2 * codes_P.numel() <= _CHUNK:
        return _expand_chunk(codes_P, absmax_G, table, block_size).to(dtype).view(shape)
    out_NK = torch.empty(shape, dtype=dtype, device=codes_P.device)
    out_GS = out_NK.view(-1, block_size)
    step = _CHUNK // block_size
    bytes_per_block = block_size // 2
    for start in range(0, absmax_G.numel(), step):
        chunk_G = absmax_G[start : start + step]
        stop = start + chunk_G.numel()
        chunk_P = codes_P[start * bytes_per_block : stop * bytes_per_block]
        out_GS[start:stop] = _expand_chunk(chunk_P, chunk_G, table, block_size)
    return out_NK


def expand_nested(
    codes_P: Tensor,
    nested: Sequence[Tensor],
    nested_block_size: int,
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """`expand` with nested statistics.

    codes (P,); nested = codes (G,), absmax (ceil(G / 256),), levels (256,), offset () -> (N, K).
    """
    absmax_G = decode_absmax(nested, nested_block_size)
    return expand(codes_P, absmax_G, shape, block_size, quant_type, dtype)


def _expand_chunk(codes_P: Tensor, absmax_G: Tensor, table: Tensor, block_size: int) -> Tensor:
    """From codes (P,) and absmax (G,) to (G, S) float32."""
    pairs_P = table.index_select(0, codes_P.int())
    return pairs_P.view(torch.float32).view(-1, block_size).mul_(absmax_G[:, None])


@cache
def _pair_table(quant_type: str, device: torch.device) -> Tensor:
    """The two levels of every byte, high nibble first, packed as one number of 8 bytes.

    () -> (256,) float64, a container of two float32 values: one look-up decodes a byte.
    """
    byte = torch.arange(256, device="cpu")
    pairs = levels(quant_type)[torch.stack([byte >> 4, byte & 15], dim=1)]
    return pairs.view(torch.float64).flatten().to(device)
