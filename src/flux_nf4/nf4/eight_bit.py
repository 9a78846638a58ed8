"""Eight-bit products in plain PyTorch: two kinds, both on the oracle's terms.

- `fp8`: e4m3 on both sides. An output row of the weight has one scale, max |absmax| / 448, so
  that no expansion needs a look at the values; a token has one scale, its largest value / 448.
- `int8`: both sides are first turned by a 64-point Walsh-Hadamard transform along K, which is
  orthonormal and so leaves the product as it is, and spreads an outlier over 64 values. 64 divides
  every NF4 block, so checkpoints need no change. A row's scale comes from its rotated values. What
  is turned has 16 bits, as that is quick: tokens are bfloat16, and turned by tensor cores; levels
  are float16, and so are their sums, each rounded, and the absmax that multiplies them in the end.

Not a quantisation of the model: the weight stays NF4, and 8 bits is how it is multiplied. On
a CPU this is slower than float32, and exact: products of integers are summed as integers.

Where two expressions are equal in theory, the one that the kernels use stands here, operation by
operation, so that most results are the same bits.

Shape letters, in this module only:
    N  out features     G  blocks, N*K / block_size     M  tokens, all leading dimensions
    K  in features      P  bytes, N*K / 2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flux_nf4.nf4 import reference

Arithmetic = Literal["bf16", "fp8", "int8"]

ROTATION = 64
# The largest magnitude of each type: a scale is the largest value divided by it.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
# What absmax in float16 is held to: that of a block of zeros may be anything.
LARGEST_HALF = 65504.0
# Smaller ones than this count as zeros: their reciprocal would overflow.
_SMALLEST = 1e-30
# Rows rotated at a time: what they need beside the weight stays small.
_CHUNK_ROWS = 1024


def eight_bit_dtype(arithmetic: Arithmetic) -> torch.dtype:
    """What `fp8` and `int8` multiply."""
    return torch.float8_e4m3fn if arithmetic == "fp8" else torch.int8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedRows:
    """Activations in 8 bits: values (*, K) e4m3 or int8 (rotated), scale (*, 1) float32."""

    values: Tensor
    scale: Tensor


def rotate(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of every 64 values, orthonormal: (..., K) -> same dtype.

    Six rounds of sums and differences of neighbours, each rounded; a round moves the lowest bit of
    the position to the top, so after six every bit is where it was. Its own inverse.
    """
    y = x.reshape(-1, ROTATION)
    for _ in range(6):
        even, odd = y.unflatten(1, (ROTATION // 2, 2)).unbind(-1)
        y = torch.cat((even + odd, even - odd), dim=1)
    return y.mul_(ROTATION**-0.5).view_as(x)


def row_scale(
    codes_P: Tensor,
    absmax_G: Tensor,
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
    arithmetic: Arithmetic,
) -> Tensor:
    """What one unit of each row's 8-bit values is worth: (N,) float32, none zero.

    Rows must end where blocks do.
    """
    num_out, num_in = shape
    if arithmetic == "fp8":
        largest_N = absmax_G.abs().view(num_out, -1).amax(dim=1)
    else:
        blocks, row_bytes = num_in // block_size, num_in // 2
        parts = []
        for start in range(0, num_out, _CHUNK_ROWS):
            stop = min(start + _CHUNK_ROWS, num_out)
            turned_NGS = _turned_levels(
                codes_P[start * row_bytes : stop * row_bytes],
                (stop - start, num_in),
                block_size,
                quant_type,
            )
            largest_NG = turned_NGS.abs().amax(dim=2).float()
            absmax_NG = absmax_G[start * blocks : stop * blocks].view_as(largest_NG)
            parts.append((largest_NG * absmax_NG.abs()).amax(dim=1))
        largest_N = torch.cat(parts)
    return largest_N.clamp_(min=_SMALLEST).div_(LARGEST[eight_bit_dtype(arithmetic)])


def expand(
    codes_P: Tensor,
    absmax_G: Tensor,
    inverse_scale_N: Tensor,
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """The weight in units of its rows' scales: (N, K) e4m3, or int8 and rotated."""
    relative_NG = absmax_G.view(shape[0], -1) * inverse_scale_N[:, None]
    layout = (shape, block_size, quant_type)
    if dtype != torch.int8:
        return reference.expand(codes_P, relative_NG.flatten(), *layout, torch.float32).to(dtype)
    turned_NGS = _turned_levels(codes_P, *layout).float()
    absmax_NG = relative_NG.clamp(-LARGEST_HALF, LARGEST_HALF).half().float()
    return _to_int8(turned_NGS.mul_(absmax_NG[:, :, None]).view(shape))


def _turned_levels(
    codes_P: Tensor, shape: Sequence[int], block_size: int, quant_type: str
) -> Tensor:
    """What absmax multiplies: (N, G / N, S) float16."""
    ones_G = torch.ones(2 * len(codes_P) // block_size, device=codes_P.device)
    levels_NK = reference.expand(codes_P, ones_G, shape, block_size, quant_type, torch.float16)
    return rotate(levels_NK).view(shape[0], -1, block_size)


def quantize_rows(x: Tensor, arithmetic: Arithmetic) -> QuantizedRows:
    """One scale a token: (*, K) -> the same in 8 bits, rotated for `int8`.

    A token with an infinity or a NaN comes out as NaN, so that it is noticed.
    """
    values = rotate(x.bfloat16().float()) if arithmetic == "int8" else x.float()
    dtype = eight_bit_dtype(arithmetic)
    largest = values.abs().amax(dim=-1, keepdim=True).clamp_(min=_SMALLEST)
    scaled = values * (LARGEST[dtype] / largest)
    return QuantizedRows(
        values=_to_int8(scaled) if dtype == torch.int8 else scaled.to(dtype),
        scale=largest * (1 / LARGEST[dtype]),
    )


def multiply(
    x_MK: Tensor,
    x_scale_M1: Tensor,
    w_NK: Tensor,
    w_scale_N: Tensor,
    bias_N: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Eight-bit rows times eight-bit rows: (M, N) `dtype`; scales and bias apply in float32."""
    if w_NK.dtype == torch.int8:
        # float32's 24 bits hold the sum of 1,040 products exactly, and K is larger.
        sums_MN = _integer_product(x_MK, w_NK).float()
    else:
        sums_MN = x_MK.float() @ w_NK.float().t()
    sums_MN.mul_(x_scale_M1).mul_(w_scale_N)
    return (sums_MN if bias_N is None else sums_MN.add_(bias_N.float())).to(dtype)


def _integer_product(x_MK: Tensor, w_NK: Tensor) -> Tensor:
    if not x_MK.is_cuda:
        return torch._int_mm(x_MK, w_NK.t())
    # cuBLAS wants more than 16 rows, and a multiple of 8 columns.
    padded = torch.nn.functional.pad
    num_rows, num_out = len(x_MK), len(w_NK)
    x_MK = padded(x_MK, (0, 0, 0, max(0, 17 - num_rows)))
    w_NK = padded(w_NK, (0, 0, 0, -num_out % 8))
    return torch._int_mm(x_MK, w_NK.t())[:num_rows, :num_out]


def _to_int8(scaled: Tensor) -> Tensor:
    return scaled.round_().to(torch.int8)
