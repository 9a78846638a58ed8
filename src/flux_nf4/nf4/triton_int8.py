"""Int8 on a GPU: what turns tokens, and the product of two int8 matrices, as Triton kernels.

Both must equal `eight_bit` bit for bit. Tokens are turned by a product with a matrix of signs, on
the tensor cores; six rounds of sums need twice the instructions, and exchanges between threads.
`triton_kernels` expands NF4 to int8.

Shape letters, in this module only:
    N  out features     K  in features      M  tokens
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from flux_nf4.nf4.eight_bit import ROTATION, rotate
from flux_nf4.nf4.triton_kernels import on_device

# Rows, columns, depth, warps, stages of the int8 product, by compute capability (the largest
# entry that is not above the device's). Shared memory bounds them: 227 KiB on Hopper, 99 KiB on
# consumer cards, of which `stages` tiles of (rows + columns) * depth bytes must fit.
INT8_TILES = {
    (8, 0): (128, 128, 64, 4, 4),
    (9, 0): (128, 128, 128, 4, 3),
    (12, 0): (128, 128, 64, 4, 4),
}
# Row tiles that share their columns while these lie in the second-level cache.
INT8_GROUP = 16


@triton.jit
def rotate64(x, signs):
    """`eight_bit.rotate` of (rows, 64) bfloat16 to float32, without its factor of 1/8.

    A product with the matrix of signs, by tensor cores: at least 16 rows.
    """
    i = tl.arange(0, 64)
    return tl.dot(x, tl.load(signs + i[:, None] * 64 + i[None, :]))


@functools.cache
def signs(device: torch.device) -> Tensor:
    """The rotation's matrix in units of 1/8, which is symmetric: (64, 64) bfloat16."""
    with torch.inference_mode(mode=False):
        turned = rotate(torch.eye(ROTATION, device="cpu")) * ROTATION**0.5
        return turned.round().bfloat16().to(device)


@triton.jit
def _int8_kernel(  # noqa: PLR0913  a kernel takes its pointers one by one
    x_MK, x_scale_M, w_NK, w_scale_N, bias_N, out_MN, num_rows, num_out, num_in,
    HAS_BIAS: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Multiply x by w.T in int32, then scales and bias in float32; one program a tile of `out`."""
    tiles_n = tl.cdiv(num_out, TILE_N)
    first_m = tl.program_id(0) // (GROUP * tiles_n) * GROUP
    group = min(tl.cdiv(num_rows, TILE_M) - first_m, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_n)
    m = (first_m + within % group) * TILE_M + tl.arange(0, TILE_M)
    n = within // group * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, TILE_K)
    # Rows beyond the end read the first ones again, which is cheaper than a mask in the loop.
    x = x_MK + (m % num_rows).to(tl.int64)[:, None] * num_in + k[None, :]
    w = w_NK + (n % num_out).to(tl.int64)[None, :] * num_in + k[:, None]
    sums = tl.zeros((TILE_M, TILE_N), dtype=tl.int32)
    for start in range(0, num_in, TILE_K):
        x_tile = tl.load(x + start, mask=(k < num_in - start)[None, :], other=0)
        w_tile = tl.load(w + start, mask=(k < num_in - start)[:, None], other=0)
        sums = tl.dot(x_tile, w_tile, sums, out_dtype=tl.int32)
    x_scale = tl.load(x_scale_M + m, mask=m < num_rows, other=0.0)
    w_scale = tl.load(w_scale_N + n, mask=n < num_out, other=0.0)
    out = sums.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
    if HAS_BIAS:
        out += tl.load(bias_N + n, mask=n < num_out, other=0.0).to(tl.float32)[None, :]
    mask = (m < num_rows)[:, None] & (n < num_out)[None, :]
    offset = m.to(tl.int64)[:, None] * num_out + n[None, :]
    tl.store(out_MN + offset, out.to(out_MN.dtype.element_ty), mask=mask)


def multiply_int8(
    x_MK: Tensor,
    x_scale_M1: Tensor,
    w_NK: Tensor,
    w_scale_N: Tensor,
    bias_N: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`eight_bit.multiply` of int8 on a GPU; all tensors contiguous."""
    (num_rows, num_in), num_out = x_MK.shape, len(w_NK)
    out_MN = torch.empty(num_rows, num_out, dtype=dtype, device=x_MK.device)
    tile_m, tile_n, tile_k, num_warps, num_stages = _int8_tiles(x_MK.device)
    with on_device(x_MK.device):
        _int8_kernel[(triton.cdiv(num_rows, tile_m) * triton.cdiv(num_out, tile_n),)](
            x_MK, x_scale_M1, w_NK, w_scale_N, w_scale_N if bias_N is None else bias_N, out_MN,
            num_rows, num_out, num_in,
            HAS_BIAS=bias_N is not None,
            TILE_M=tile_m,
            TILE_N=tile_n,
            TILE_K=tile_k,
            GROUP=INT8_GROUP,
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out_MN


@functools.cache
def _int8_tiles(device: torch.device) -> tuple[int, int, int, int, int]:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return INT8_TILES[max(known for known in INT8_TILES if known <= capability)]
