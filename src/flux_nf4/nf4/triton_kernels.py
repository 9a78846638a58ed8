"""NF4 expansion on a GPU: one Triton kernel for float32 absmax, one that un-nests on the way.

Must equal `reference.expand` bit for bit: the exact float32 table, one rounding to the output
type. Bound by memory: half a byte in and two bytes out for each value, so the only aims are whole
cache lines and no second pass for nested statistics. This module imports Triton, hence only
`ops` imports it, and only where a GPU is at hand.

A program expands `GROUP` blocks. Interleaving the two nibbles of a byte keeps values in the
registers of the thread that loaded the byte, so stores are as wide as loads allow.

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

from flux_nf4.nf4.codec import levels

# Values per program: 16 for each of 128 threads.
_VALUES_PER_PROGRAM = 2048


@triton.jit
def _store_blocks(codes_P, out, levels16, absmax, block, mask, BLOCK_SIZE: tl.constexpr):
    """out[block, :] = level[code] * absmax[block], for the (GROUP,) blocks of this program."""
    half: tl.constexpr = BLOCK_SIZE // 2
    byte_offset = block[:, None] * half + tl.arange(0, half)[None, :]
    byte = tl.load(codes_P + byte_offset, mask=mask[:, None], other=0).to(tl.int32)
    high = tl.load(levels16 + (byte >> 4)) * absmax[:, None]
    low = tl.load(levels16 + (byte & 15)) * absmax[:, None]
    value = tl.interleave(high, low)
    offset = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _expand_kernel(
    codes_P, absmax_G, levels16, out_NK, num_blocks, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """From codes (P,) uint8 and absmax (G,) float32 to (N, K)."""
    # 64 bits: FLUX's matrices stay below 2**31 values, but nothing here should depend on it.
    block = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    mask = block < num_blocks
    absmax = tl.load(absmax_G + block, mask=mask, other=0.0)
    _store_blocks(codes_P, out_NK, levels16, absmax, block, mask, BLOCK_SIZE)


@triton.jit
def _expand_nested_kernel(  # noqa: PLR0913  a kernel takes its pointers one by one
    codes_P,
    nested_codes_G,
    nested_absmax,
    nested_levels,
    nested_offset,
    levels16,
    out_NK,
    num_blocks,
    NESTED_BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """With absmax = nested_levels[code] * nested_absmax[g // 256] + offset.

    Launched without fusion of multiply and add: bitsandbytes rounds twice, and so do we.
    """
    block = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    mask = block < num_blocks
    nested_code = tl.load(nested_codes_G + block, mask=mask, other=0).to(tl.int32)
    scale = tl.load(nested_absmax + block // NESTED_BLOCK_SIZE, mask=mask, other=0.0)
    absmax = tl.load(nested_levels + nested_code) * scale + tl.load(nested_offset)
    _store_blocks(codes_P, out_NK, levels16, absmax, block, mask, BLOCK_SIZE)


@functools.cache
def _device_levels(quant_type: str, device: torch.device) -> Tensor:
    return levels(quant_type).to(device)


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
    group = _VALUES_PER_PROGRAM // block_size
    num_blocks = absmax_G.numel()
    with _on(codes_P.device):
        _expand_kernel[(triton.cdiv(num_blocks, group),)](
            codes_P,
            absmax_G,
            _device_levels(quant_type, codes_P.device),
            out_NK,
            num_blocks,
            GROUP=group,
            BLOCK_SIZE=block_size,
        )
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
    """`reference.expand_nested` on a GPU, in one pass.

    codes (P,); nested = codes (G,), absmax (ceil(G / 256),), levels (256,), offset () -> (N, K).
    """
    nested_codes_G, nested_absmax, nested_levels, nested_offset = nested
    out_NK = torch.empty(shape, dtype=dtype, device=codes_P.device)
    group = _VALUES_PER_PROGRAM // block_size
    num_blocks = nested_codes_G.numel()
    with _on(codes_P.device):
        _expand_nested_kernel[(triton.cdiv(num_blocks, group),)](
            codes_P,
            nested_codes_G,
            nested_absmax,
            nested_levels,
            nested_offset,
            _device_levels(quant_type, codes_P.device),
            out_NK,
            num_blocks,
            NESTED_BLOCK_SIZE=nested_block_size,
            GROUP=group,
            BLOCK_SIZE=block_size,
            enable_fp_fusion=False,
        )
    return out_NK


def _on(device: torch.device) -> torch.cuda.device:
    # Triton launches on the current device, which need not be the tensors' own; with an index
    # below 0 (the interpreter's CPU tensors) this changes nothing.
    return torch.cuda.device(device.index if device.type == "cuda" else -1)
