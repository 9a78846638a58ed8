"""NF4 on a GPU: one Triton kernel that expands a weight to any floating-point type, or to int8.

Expansion must equal `reference.expand` and `eight_bit.expand` bit for bit: the exact float32
table, one rounding to the output type. Bound by memory: half a byte in and one or two bytes out
for each value, so the only aims are whole cache lines and no second pass for nested statistics.
This module imports Triton, hence only `ops` imports it, and only where a GPU is at hand.

A program expands `GROUP` blocks. Interleaving the two nibbles of a byte keeps values in the
registers of the thread that loaded the byte, so stores are as wide as loads allow.

On NVIDIA's GPUs a thread picks a block's values from a table of its own instead (`picking`).

Shape letters, in this module only:
    N  out features     S  block size             P  bytes, N*K / 2
    K  in features      G  blocks, N*K / S
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from flux_nf4.nf4 import eight_bit
from flux_nf4.nf4.codec import levels
from flux_nf4.nf4.picking import Picked, instructions

# Measured on an H200 (`benchmarks.kernels`): values per program of the expansion, and its warps.
PROGRAM = (4096, 2)
INT8_PROGRAM = (16384, 2)
LARGEST_HALF = tl.constexpr(eight_bit.LARGEST_HALF)
_PICKED: dict[torch.dtype, Picked] = {
    torch.float8_e4m3fn: "e4m3",
    torch.bfloat16: "bf16",
    torch.int8: "int8",
}


@triton.jit
def load_absmax(absmax_G, nested, block, mask, NESTED_BLOCK_SIZE: tl.constexpr):
    """The absmax of blocks, float32; `nested` are its own absmax, levels and offset."""
    absmax = tl.load(absmax_G + block, mask=mask, other=0)
    if NESTED_BLOCK_SIZE:
        scale = tl.load(nested[0] + block // NESTED_BLOCK_SIZE, mask=mask, other=0.0)
        absmax = tl.load(nested[1] + absmax.to(tl.int32)) * scale + tl.load(nested[2])
    return absmax


@triton.jit
def _expand_kernel(  # noqa: PLR0913  a kernel takes its pointers one by one
    codes_P, absmax_G, nested_absmax, nested_levels, nested_offset,
    inverse_scale_N, levels16, out_NK, num_blocks, blocks_per_row,
    NESTED_BLOCK_SIZE: tl.constexpr, IS_SCALED: tl.constexpr, PICKING: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """out[block, :] = level[code] * absmax[block], in units of the row's scale if IS_SCALED.

    absmax_G is float32, or uint8 where NESTED_BLOCK_SIZE is not 0; PICKING instructions, or empty.
    Launched without fusion of multiply and add: bitsandbytes rounds a nested absmax twice, and so
    do we.
    """
    # 64 bits: FLUX's matrices stay below 2**31 values, but nothing here should depend on it.
    block = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    mask = block < num_blocks
    nested = (nested_absmax, nested_levels, nested_offset)
    absmax = load_absmax(absmax_G, nested, block, mask, NESTED_BLOCK_SIZE)
    if IS_SCALED:
        # 32 bits: a weight has fewer than 2**31 blocks, and 64 would take a branch.
        row = block.to(tl.uint32) // tl.cast(blocks_per_row, tl.uint32)
        absmax *= tl.load(inverse_scale_N + row, mask=mask, other=0.0)
    if out_NK.dtype.element_ty == tl.int8:
        absmax = tl.clamp(absmax, -LARGEST_HALF, LARGEST_HALF)

    if PICKING != "":
        _store_picked(codes_P, absmax, out_NK, block, mask, PICKING, GROUP)
    else:
        _store_looked_up(
            codes_P, absmax, levels16, out_NK, block[:, None], mask[:, None], BLOCK_SIZE
        )


@triton.jit
def _store_looked_up(codes_P, absmax, levels16, out_NK, block, mask, BLOCK_SIZE: tl.constexpr):
    """Each code's level, for int8 rotated, times its block's absmax."""
    half: tl.constexpr = BLOCK_SIZE // 2
    byte = tl.load(codes_P + block * half + tl.arange(0, half)[None, :], mask=mask, other=0)
    byte = byte.to(tl.int32)
    high, low = tl.load(levels16 + (byte >> 4)), tl.load(levels16 + (byte & 15))
    if out_NK.dtype.element_ty == tl.int8:
        turned = _turned_halves(tl.interleave(high, low).to(tl.float16))
        value = round_int8(turned * absmax.to(tl.float16).to(tl.float32)[:, None])
    else:
        value = tl.interleave(high * absmax[:, None], low * absmax[:, None])
    place = out_NK + block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    tl.store(place, value.to(out_NK.dtype.element_ty), mask=mask)


@triton.jit
def _turned_halves(x):
    """`eight_bit.rotate` of (blocks, values) float16, every sum rounded; its results as float32."""
    blocks: tl.constexpr = x.shape[0]
    size: tl.constexpr = x.shape[1]
    rows: tl.constexpr = blocks * size // 64
    for _ in tl.static_range(6):
        even, odd = tl.split(tl.reshape(x, [rows, 32, 2]))
        x = tl.permute(tl.join(even + odd, even - odd), [0, 2, 1])
    return tl.reshape(x, [blocks, size]).to(tl.float32) * 0.125


@triton.jit
def round_int8(scaled):
    """The nearest integer, of halves the even one, of values within -127 and 127.

    From 2^23 to 2^24 float32 has the integers, and 1.5 * 2^23 ends in a zero byte: so the sum's
    last byte is the integer. A conversion would run at an eighth of a sum's speed.
    """
    return (scaled + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _store_picked(codes_P, absmax, out_NK, block, mask, PICKING: tl.constexpr, GROUP: tl.constexpr):
    """A block by each thread: 32 bytes of codes in, 64 of 8-bit values or 128 of bfloat16 out."""
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
    values, num_warps = INT8_PROGRAM if out_NK.dtype == torch.int8 else PROGRAM
    group = values // block_size
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
            num_warps=num_warps,
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


def on_device(device: torch.device) -> torch.cuda.device:
    """Make `device` the current one, on which Triton launches whatever the tensors' own is."""
    # With an index below 0 (the interpreter's CPU tensors) this changes nothing.
    return torch.cuda.device(device.index if device.type == "cuda" else -1)
