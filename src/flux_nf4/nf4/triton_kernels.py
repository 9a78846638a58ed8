"""NF4 on a GPU: one Triton kernel that expands a weight to any type, and an int8 product.

Expansion must equal `reference.expand` and `eight_bit.expand` bit for bit: the exact float32
table, one rounding to the output type. Bound by memory: half a byte in and one or two bytes out
for each value, so the only aims are whole cache lines and no second pass, neither for nested
statistics nor for the rotation of int8. This module imports Triton, hence only `ops` imports it,
and only where a GPU is at hand.

A program expands `GROUP` blocks. Interleaving the two nibbles of a byte keeps values in the
registers of the thread that loaded the byte, so stores are as wide as loads allow.

On NVIDIA's GPUs a thread picks a block's values from a table of its own instead (`picking`).

Shape letters, in this module only:
    N  out features     S  block size             P  bytes, N*K / 2
    K  in features      G  blocks, N*K / S        M  tokens
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from flux_nf4.nf4.codec import levels
from flux_nf4.nf4.picking import Picked, instructions

# Measured on an H200 (`benchmarks.kernels`): values per program and warps of the expansion.
VALUES_PER_PROGRAM = 4096
EXPAND_WARPS = 2
_PICKED: dict[torch.dtype, Picked] = {torch.float8_e4m3fn: "e4m3", torch.bfloat16: "bf16"}
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
def rotate64(x, ROWS: tl.constexpr):
    """`eight_bit.rotate` of (ROWS, 64) float32, without its factor of 1/8."""
    for _ in tl.static_range(6):
        even, odd = tl.split(tl.reshape(x, [ROWS, 32, 2]))
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), [0, 2, 1]), [ROWS, 64])
    return x


@triton.jit
def round_int8(scaled):
    """The nearest integer, halves upwards, of values within -127 and 127."""
    return tl.floor(scaled + 0.5).to(tl.int8)


@triton.jit
def _expand_kernel(  # noqa: PLR0913  a kernel takes its pointers one by one
    codes_P,
    absmax_G,  # float32; uint8 codes where NESTED_BLOCK_SIZE is not 0
    nested_absmax,
    nested_levels,
    nested_offset,
    inverse_scale_N,
    levels16,
    out_NK,
    num_blocks,
    blocks_per_row,
    NESTED_BLOCK_SIZE: tl.constexpr,
    IS_SCALED: tl.constexpr,
    PICKING: tl.constexpr,  # instructions, or empty
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """out[block, :] = level[code] * absmax[block], in units of the row's scale if IS_SCALED.

    Launched without fusion of multiply and add: bitsandbytes rounds a nested absmax twice, and so
    do we.
    """
    # 64 bits: FLUX's matrices stay below 2**31 values, but nothing here should depend on it.
    block = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    mask = block < num_blocks
    absmax = tl.load(absmax_G + block, mask=mask, other=0)
    if NESTED_BLOCK_SIZE:
        scale = tl.load(nested_absmax + block // NESTED_BLOCK_SIZE, mask=mask, other=0.0)
        absmax = tl.load(nested_levels + absmax.to(tl.int32)) * scale + tl.load(nested_offset)
    if IS_SCALED:
        absmax *= tl.load(inverse_scale_N + block // blocks_per_row, mask=mask, other=0.0)

    if PICKING != "":
        _store_picked(codes_P, absmax, out_NK, block, mask, PICKING, GROUP)
    else:
        _store_looked_up(
            codes_P, absmax, levels16, out_NK, block[:, None], mask[:, None], GROUP, BLOCK_SIZE
        )


@triton.jit
def _store_looked_up(
    codes_P, absmax, levels16, out_NK, block, mask, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Each code's level, times its block's absmax; for int8 rotated and rounded."""
    half: tl.constexpr = BLOCK_SIZE // 2
    byte = tl.load(codes_P + block * half + tl.arange(0, half)[None, :], mask=mask, other=0)
    byte = byte.to(tl.int32)
    high = tl.load(levels16 + (byte >> 4)) * absmax[:, None]
    low = tl.load(levels16 + (byte & 15)) * absmax[:, None]
    value = tl.interleave(high, low)
    place = out_NK + block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    if out_NK.dtype.element_ty == tl.int8:
        rows: tl.constexpr = GROUP * BLOCK_SIZE // 64
        turned = tl.reshape(rotate64(tl.reshape(value, [rows, 64]), rows), [GROUP, BLOCK_SIZE])
        tl.store(place, round_int8(turned * 0.125), mask=mask)
    else:
        tl.store(place, value.to(out_NK.dtype.element_ty), mask=mask)


@triton.jit
def _store_picked(codes_P, absmax, out_NK, block, mask, PICKING: tl.constexpr, GROUP: tl.constexpr):
    """A block by each thread: 32 bytes of codes in, 64 of e4m3 or 128 of bfloat16 out."""
    place = block[:, None] * 4 + tl.arange(0, 4)[None, :]
    words = tl.load(codes_P.to(tl.pointer_type(tl.int64)) + place, mask=mask[:, None], other=0)
    even, odd = tl.split(tl.reshape(words, [GROUP, 2, 2]))
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)
    num_out: tl.constexpr = 8 * out_NK.dtype.element_ty.primitive_bitwidth // 8
    if num_out == 8:
        o0, o1, o2, o3, o4, o5, o6, o7 = tl.inline_asm_elementwise(
            PICKING,
            "=&l," * 8 + "l,l,l,l,f",
            [c0, c1, c2, c3, absmax],
            dtype=(tl.int64,) * 8,
            is_pure=True,
            pack=1,
        )
        values = _in_order(o0, o1, o2, o3, o4, o5, o6, o7)
    else:
        o0, o1, o2, o3, o4, o5, o6, o7, p0, p1, p2, p3, p4, p5, p6, p7 = tl.inline_asm_elementwise(
            PICKING,
            "=&l," * 16 + "l,l,l,l,f",
            [c0, c1, c2, c3, absmax],
            dtype=(tl.int64,) * 16,
            is_pure=True,
            pack=1,
        )
        even = _in_order(o0, o2, o4, o6, p0, p2, p4, p6)
        odd = _in_order(o1, o3, o5, o7, p1, p3, p5, p7)
        values = tl.join(even, odd)
    values = tl.reshape(values, [GROUP, num_out])
    place = block[:, None] * num_out + tl.arange(0, num_out)[None, :]
    tl.store(out_NK.to(tl.pointer_type(tl.int64)) + place, values, mask=mask[:, None])


@triton.jit
def _in_order(a, b, c, d, e, f, g, h):
    """Eight tensors as one, of three more axes: the bits of their numbers."""
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.join(even, odd)


def _picking(codes_P: Tensor, out_NK: Tensor, block_size: int, quant_type: str) -> str:
    """The instructions to pick with, or none."""
    picked = _PICKED.get(out_NK.dtype)
    is_aligned = codes_P.data_ptr() % 8 == 0 and out_NK.data_ptr() % 8 == 0
    if picked is None or block_size != 64 or not is_aligned:
        return ""
    return instructions(quant_type, picked) if _can_pick(codes_P.device) else ""


@functools.cache
def _can_pick(device: torch.device) -> bool:
    """Whether it has the conversions to pick from: before Ampere there are none to bfloat16."""
    is_own = has_own_instructions(_expand_kernel)
    return is_own and torch.cuda.get_device_capability(device) >= (8, 0)


def has_own_instructions(kernel: object) -> bool:
    """Whether a kernel runs on a GPU of NVIDIA's, and may hold instructions in their own words."""
    return torch.version.hip is None and not isinstance(kernel, InterpretedFunction)


@functools.cache
def _device_levels(quant_type: str, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return levels(quant_type).to(device)


def expand_into(
    out_NK: Tensor,
    codes_P: Tensor,
    absmax: Sequence[Tensor],
    nested_block_size: int,
    inverse_scale_N: Tensor | None,
    block_size: int,
    quant_type: str,
) -> Tensor:
    """Fill `out_NK`; its dtype decides: 16 bits or more exact, e4m3 and int8 as `eight_bit` has it.

    codes (P,); absmax = [(G,)], or nested = [codes (G,), absmax (ceil(G / 256),), levels (256,),
    offset ()] with its block size; all contiguous. `inverse_scale_N` is 1 / scale of each row.
    """
    group = VALUES_PER_PROGRAM // block_size
    num_blocks = absmax[0].numel()
    # Unused pointers must point at something.
    nested = absmax[1:] if len(absmax) > 1 else (absmax[0],) * 3
    with on_device(codes_P.device):
        _expand_kernel[(triton.cdiv(num_blocks, group),)](
            codes_P,
            absmax[0],
            *nested,
            absmax[0] if inverse_scale_N is None else inverse_scale_N,
            _device_levels(quant_type, codes_P.device),
            out_NK,
            num_blocks,
            # Only a scaled weight must have rows that end where blocks do.
            max(1, out_NK.shape[-1] // block_size),
            NESTED_BLOCK_SIZE=nested_block_size if len(absmax) > 1 else 0,
            IS_SCALED=inverse_scale_N is not None,
            PICKING=_picking(codes_P, out_NK, block_size, quant_type),
            GROUP=group,
            BLOCK_SIZE=block_size,
            num_warps=EXPAND_WARPS,
            enable_fp_fusion=False,
        )
    return out_NK


def expand(
    codes_P: Tensor,
    absmax_G: Tensor,
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.expand` on a GPU.

    codes (P,) uint8, absmax (G,) float32, both contiguous -> (N, K) `dtype`.
    """
    out_NK = torch.empty(shape, dtype=dtype, device=codes_P.device)
    return expand_into(out_NK, codes_P, [absmax_G], 0, None, block_size, quant_type)


def expand_nested(
    codes_P: Tensor,
    nested: Sequence[Tensor],
    nested_block_size: int,
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.expand_nested` on a GPU, in one pass.

    codes (P,); nested = codes (G,), absmax (ceil(G / 256),), levels (256,), offset () -> (N, K).
    """
    out_NK = torch.empty(shape, dtype=dtype, device=codes_P.device)
    return expand_into(out_NK, codes_P, nested, nested_block_size, None, block_size, quant_type)


@triton.jit
def _int8_kernel(  # noqa: PLR0913  a kernel takes its pointers one by one
    x_MK,
    x_scale_M,
    w_NK,
    w_scale_N,
    bias_N,
    out_MN,
    num_rows,
    num_out,
    num_in,
    HAS_BIAS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
):
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
            x_MK,
            x_scale_M1,
            w_NK,
            w_scale_N,
            w_scale_N if bias_N is None else bias_N,
            out_MN,
            num_rows,
            num_out,
            num_in,
            HAS_BIAS=bias_N is not None,
            TILE_M=tile_m,
            TILE_N=tile_n,
            TILE_K=tile_k,
            GROUP=INT8_GROUP,
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=False,
        )
    return out_MN


@functools.cache
def _int8_tiles(device: torch.device) -> tuple[int, int, int, int, int]:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return INT8_TILES[max(known for known in INT8_TILES if known <= capability)]


def on_device(device: torch.device) -> torch.cuda.device:
    """Make `device` the current one, on which Triton launches whatever the tensors' own is."""
    # With an index below 0 (the interpreter's CPU tensors) this changes nothing.
    return torch.cuda.device(device.index if device.type == "cuda" else -1)
