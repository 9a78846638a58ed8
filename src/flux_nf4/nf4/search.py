"""Better codes in the same bytes: the scale of every block that minimises its squared error.

Absmax, the rule of NF4, scales a block so that its largest value is met exactly; all others pay
for it. Here the scale is free, and in v2 it may be negative: NF4 has one level more above zero
than below, and a negative scale turns the table round. Every reader of the format decodes it.

For fixed codes the best scale is known: with l the levels, s = <w,l> / <l,l>, and the squared error
falls by <w,l>**2 / <l,l>. What remains is to find the codes, among a few hundred candidates that
a growing scale runs through. Three steps:

1. A grid of scales, relative to absmax. Values are sorted into cells once; how much a cell adds to
   <w,l> and to <l,l> at each scale of the grid is a row of a table, so that the sums of all
   scales at once are an `embedding_bag`: about 0.1 ns for a value and a scale.
2. The best of the grid is refined: codes nearest under its scale, then their own best scale.
3. A block keeps absmax wherever that is not worse.

This ends 0.03 % above the least squared error there is, on Gaussian weights and on a real model's
(`benchmarks/scale_search.py`, which finds that by walking through every change of a code).

Shape letters, in this module only:
    N  out features         G  blocks, N*K / S
    K  in features          P  bytes, N*K / 2
    S  block size           J  scales of the grid
    C  cells                V  values of one chunk, flat
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from flux_nf4.nf4 import reference
from flux_nf4.nf4.codec import NF4Weight, QuantType, levels

# Values searched at a time: the largest temporary, the sums of the grid, has twice their bytes.
_CHUNK = 2**18

# Cells from -1 to 1 that values are sorted into for the grid; the refinement is exact.
_NUM_CELLS = 1025

# The grid, relative to absmax. Below it the largest value is clipped at too high a price; near its
# end the largest value is met by the third highest level.
_LOWEST, _HIGHEST, _NUM_SCALES = 0.75, 1.8, 36

# An error in float32 of 64 or 128 squares is known to about 1e-6: less is no gain.
_LEAST_GAIN = 1e-5

# Below it float32 has too few digits for level x scale, and bitsandbytes' reciprocals end.
_SMALLEST_ABSMAX = 1e-30


@torch.no_grad()
def quantize_searched(
    w_NK: Tensor,
    *,
    block_size: int = 64,
    signed: bool = True,
    quant_type: QuantType = "nf4",
) -> NF4Weight:
    """`reference.quantize` with the scale of every block searched for, not taken from its absmax.

    (N, K) -> codes (P,) uint8, absmax (G,) float32.

    No block decodes (to float32) with a larger squared error than by `reference.quantize`.
    `signed` allows negative scales; do without where absmax is to be nested (v1), as that is
    precise only near the mean of all scales. Zeros are treated as in `reference.quantize`.

    Raises:
        InputError: as `reference.quantize`.
        ShapeError: as `reference.quantize`.
    """
    weight = reference.quantize(w_NK, block_size=block_size, quant_type=quant_type)
    absmax_G = weight.float_absmax()
    w_GS = w_NK.detach().reshape(-1).view(-1, block_size)
    codes_GB = weight.codes.view(-1, block_size // 2)
    step = _CHUNK // block_size
    for start in range(0, absmax_G.numel(), step):
        blocks = slice(start, start + step)
        w_blocks_GS = w_GS[blocks].float()
        _improve(w_blocks_GS, codes_GB[blocks], absmax_G[blocks], quant_type, signed=signed)
    return weight


def _improve(
    w_GS: Tensor, codes_GB: Tensor, absmax_G: Tensor, quant_type: QuantType, *, signed: bool
) -> None:
    """Write better codes (G, S / 2) and scales (G,) over those of blocks that have such."""
    x_GS = w_GS / absmax_G.clamp(min=_SMALLEST_ABSMAX)[:, None]
    scale_G = _best_of_grid(x_GS, quant_type, signed=signed)
    scaled_V = (x_GS / scale_G[:, None]).clamp_(-1, 1).view(-1)
    codes_V = reference.nearest_codes(scaled_V, quant_type)
    found_GB = (codes_V[0::2] << 4 | codes_V[1::2]).view(codes_GB.shape)
    levels_GS = _levels_of(found_GB, quant_type)
    scale_G = (x_GS * levels_GS).sum(dim=1) / levels_GS.square().sum(dim=1)
    found_G = absmax_G * scale_G
    error_G = x_GS.addcmul(levels_GS, scale_G[:, None], value=-1).square().sum(dim=1)
    absmax_error_G = (x_GS - _levels_of(codes_GB, quant_type)).square_().sum(dim=1)
    is_better_G = error_G < absmax_error_G * (1 - _LEAST_GAIN)
    is_better_G &= found_G.isfinite() & (absmax_G >= _SMALLEST_ABSMAX)
    codes_GB.copy_(torch.where(is_better_G[:, None], found_GB, codes_GB))
    absmax_G.copy_(torch.where(is_better_G, found_G, absmax_G))


def _levels_of(codes_GB: Tensor, quant_type: QuantType) -> Tensor:
    """What packed codes stand for under a scale of 1: (G, S) float32."""
    num_blocks, bytes_per_block = codes_GB.shape
    shape = (num_blocks, 2 * bytes_per_block)
    ones_G = torch.ones(num_blocks, device=codes_GB.device)
    return reference.expand(
        codes_GB.reshape(-1), ones_G, shape, 2 * bytes_per_block, quant_type, torch.float32
    )


def _best_of_grid(x_GS: Tensor, quant_type: QuantType, *, signed: bool) -> Tensor:
    """The best scale, of codes that are nearest under a scale of the grid: (G,) float32."""
    table = _grid_table(quant_type, signed, x_GS.device)
    cell_GS = (x_GS * (_NUM_CELLS // 2)).add_(_NUM_CELLS / 2).int()
    sums = torch.nn.functional.embedding_bag(cell_GS, table, mode="sum")
    dot_GJ, square_GJ = sums.chunk(2, dim=1)
    scale_GJ = dot_GJ / square_GJ
    best_G1 = (scale_GJ * dot_GJ).nan_to_num_(nan=-1).argmax(dim=1, keepdim=True)
    # Zeros have no best scale: any will do.
    return scale_GJ.gather(1, best_G1).squeeze(1).nan_to_num_(nan=1)


@cache
def _grid_table(quant_type: QuantType, signed: bool, device: torch.device) -> Tensor:
    """What a value in each cell adds to <x,l> and to <l,l> at each scale: (C, 2 J) float32.

    With a negative scale for each positive one if `signed`.
    """
    ends = (math.log2(_LOWEST), math.log2(_HIGHEST))
    scale_J = torch.logspace(*ends, _NUM_SCALES, base=2, device="cpu")
    if signed:
        scale_J = torch.cat([scale_J, -scale_J])
    x_C1 = torch.linspace(-1, 1, _NUM_CELLS, device="cpu")[:, None]
    codes = reference.nearest_codes((x_C1 / scale_J).clamp_(-1, 1).view(-1), quant_type)
    level_CJ = levels(quant_type)[codes.int()].view(_NUM_CELLS, -1)
    return torch.cat([level_CJ * x_C1, level_CJ.square()], dim=1).to(device)
