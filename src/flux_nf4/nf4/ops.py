"""The one door to NF4 arithmetic: chooses a kernel or the reference, and nothing else does.

Two operators, `flux_nf4::dequantize_4bit` and `flux_nf4::dequantize_4bit_nested`, are declared to
PyTorch with schemas, and with fake kernels that check the arguments and compute only shapes. So
`torch.compile` sees one opaque step: it neither breaks the graph nor looks inside.

| tensors on | runs                                                                   |
|------------|------------------------------------------------------------------------|
| CUDA       | `triton_kernels`, `triton_int8`; without Triton the reference          |
| elsewhere  | `reference`, and `eight_bit` for products in 8 bits                    |

`expand_for_product` and `multiply` are plain functions, for layers that run eagerly hundreds of
times a step: PyTorch's dispatcher costs as much as launching a kernel. They leave out what `_check`
checks: their caller has done so, once.

Shape letters, in this module only:
    N  out features     G  blocks, N*K / block_size     *  any leading dimensions
    K  in features      P  bytes, N*K / 2
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flux_nf4.errors import InputError, ShapeError
from flux_nf4.nf4 import eight_bit, fast_cpu, reference
from flux_nf4.nf4.codec import (
    NestedAbsmax,
    NF4Weight,
    QuantType,
    check_block_size,
    check_fills_blocks,
    check_quant_type,
    decode_absmax,
)
from flux_nf4.nf4.eight_bit import QuantizedRows
from flux_nf4.nf4.scratch import scratch

if TYPE_CHECKING:
    from types import ModuleType


def quantize(
    w_NK: Tensor, *, block_size: int = 64, quant_type: QuantType = "nf4", nested: bool = False
) -> NF4Weight:
    """`reference.quantize`, on whatever device the values lie, by a shorter way where there is one.

    Raises:
        InputError, ShapeError: as `reference.quantize`.
    """
    if w_NK.device.type == "cpu" and w_NK.dtype == torch.bfloat16 and quant_type == "nf4":
        check_block_size(block_size)
        check_fills_blocks(w_NK.shape, block_size)
        found = fast_cpu.quantize_blocks(w_NK.detach().reshape(-1, block_size))
        if found is not None:
            codes_P, absmax_G = found
            return NF4Weight(
                codes=codes_P,
                absmax=reference.nest_absmax(absmax_G) if nested else absmax_G,
                shape=(w_NK.shape[0], w_NK.shape[1]),
                block_size=block_size,
            )
    return reference.quantize(w_NK, block_size=block_size, quant_type=quant_type, nested=nested)


def dequantize(weight: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """`reference.dequantize`, by the fastest means that the weight's device offers.

    codes (P,), absmax (G,) or nested -> (N, K), in `weight.dtype` by default.

    Raises:
        InputError: `dtype` is not a floating-point type of 16 bits or more.
    """
    absmax = weight.absmax
    layout = (weight.shape, weight.block_size, weight.quant_type, dtype or weight.dtype)
    if not isinstance(absmax, NestedAbsmax):
        return dequantize_4bit(weight.codes, absmax, *layout)
    return dequantize_4bit_nested(weight.codes, absmax.tensors(), absmax.block_size, *layout)


def dequantize_4bit(
    codes_P: Tensor,
    absmax_G: Tensor,
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """Expand codes with float32 absmax (v2): the operator, for modules that keep bare tensors.

    codes (P,) uint8, absmax (G,) float32 -> (N, K) `dtype`.

    Raises:
        InputError: an unknown dtype, block size or quant_type, or a tensor that is not contiguous.
        ShapeError: tensors that do not make a weight of `shape`.
    """
    return torch.ops.flux_nf4.dequantize_4bit(
        codes_P, absmax_G, shape, block_size, quant_type, dtype
    )


def dequantize_4bit_nested(
    codes_P: Tensor,
    nested: Sequence[Tensor],
    nested_block_size: int,
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """Expand codes whose absmax is itself quantised (v1): the operator.

    codes (P,) uint8; nested = codes (G,) uint8, absmax (ceil(G / 256),), levels (256,) and
    offset (), all float32 -> (N, K) `dtype`.

    Raises:
        InputError: an unknown dtype, block size or quant_type, or a tensor that is not contiguous.
        ShapeError: tensors that do not make a weight of `shape`.
    """
    return torch.ops.flux_nf4.dequantize_4bit_nested(
        codes_P, nested, nested_block_size, shape, block_size, quant_type, dtype
    )


def expand_for_product(
    codes_P: Tensor,
    absmax: Sequence[Tensor],
    nested_block_size: int,
    inverse_scale_N: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """A weight for one use: where there is a kernel, it lies in the device's one scratch buffer.

    codes (P,); absmax [(G,)], or the four tensors of a nested one -> (N, K) `dtype`. With e4m3 or
    int8 the values are in units of the rows' scales, whose reciprocals are `inverse_scale_N`.

    Raises:
        InputError: without scales, a dtype that is not a floating-point type of 16 bits or more.
    """
    if inverse_scale_N is None:
        reference.check_out_dtype(dtype)
    implementation = _implementation(codes_P.device.type)
    if implementation is not reference:
        out_NK = scratch(shape, dtype, codes_P.device)
        how = (nested_block_size, inverse_scale_N, block_size, quant_type)
        return implementation.expand_into(out_NK, codes_P, absmax, *how)
    absmax_G = decode_absmax(absmax, nested_block_size) if len(absmax) > 1 else absmax[0]
    if inverse_scale_N is None:
        return reference.expand(codes_P, absmax_G, shape, block_size, quant_type, dtype)
    return eight_bit.expand(
        codes_P, absmax_G, inverse_scale_N, shape, block_size, quant_type, dtype
    )


# The tensor cores' own accumulator, of about 14 bits. The other way is to add up in float32 every
# 128 products, for a third of the speed.
FAST_ACCUMULATION = True


def multiply(
    rows: QuantizedRows,
    w_NK: Tensor,
    w_scale_N: Tensor,
    bias_N: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`eight_bit.multiply`, by the fastest means of the device: rows (*, K) -> (*, N) `dtype`."""
    x_MK = rows.values.reshape(-1, rows.values.shape[-1]).contiguous()
    x_scale_M1 = rows.scale.reshape(-1, 1).contiguous()
    if x_MK.is_cuda and w_NK.dtype == torch.float8_e4m3fn:
        # One scale a row is offered for bfloat16 results only.
        out_MN = torch._scaled_mm(
            x_MK,
            w_NK.t(),
            scale_a=x_scale_M1,
            scale_b=w_scale_N[None],
            bias=None if bias_N is None else bias_N.bfloat16(),
            out_dtype=torch.bfloat16,
            use_fast_accum=FAST_ACCUMULATION,
        ).to(dtype)
    elif w_NK.dtype == torch.int8 and _implementation(x_MK.device.type) is not reference:
        from flux_nf4.nf4 import triton_int8

        out_MN = triton_int8.multiply_int8(x_MK, x_scale_M1, w_NK, w_scale_N, bias_N, dtype)
    else:
        out_MN = eight_bit.multiply(x_MK, x_scale_M1, w_NK, w_scale_N, bias_N, dtype)
    return out_MN.view(*rows.values.shape[:-1], len(w_NK))


@cache
def _implementation(device_type: str) -> ModuleType:
    """The module whose `expand` and `expand_nested` serve tensors of this device."""
    if device_type == "cuda" and importlib.util.find_spec("triton") is not None:
        from flux_nf4.nf4 import triton_kernels

        return triton_kernels
    return reference


def _run(codes_P: Tensor, absmax_G: Tensor, *layout: Any) -> Tensor:
    _check(codes_P, absmax_G, *layout)
    _check_dtypes({"absmax": absmax_G}, torch.float32)
    return _implementation(codes_P.device.type).expand(codes_P, absmax_G, *layout)


def _run_nested(codes_P: Tensor, nested: list[Tensor], block_size: int, *layout: Any) -> Tensor:
    _check_nested(nested, block_size)
    _check(codes_P, nested[0], *layout)
    implementation = _implementation(codes_P.device.type)
    return implementation.expand_nested(codes_P, nested, block_size, *layout)


def _fake(codes_P: Tensor, absmax_G: Tensor, *layout: Any) -> Tensor:
    _check(codes_P, absmax_G, *layout)
    _check_dtypes({"absmax": absmax_G}, torch.float32)
    return _empty(codes_P, *layout)


def _fake_nested(codes_P: Tensor, nested: list[Tensor], block_size: int, *layout: Any) -> Tensor:
    _check_nested(nested, block_size)
    _check(codes_P, nested[0], *layout)
    return _empty(codes_P, *layout)


def _empty(
    codes_P: Tensor, shape: Sequence[int], _block_size: int, _quant_type: str, dtype: torch.dtype
) -> Tensor:
    return codes_P.new_empty(shape, dtype=dtype)


def _register(
    name: str, schema: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> None:
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "default", run)
    torch.library.register_fake(name, fake)


def _check(
    codes_P: Tensor,
    blocks_G: Tensor,
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
    dtype: torch.dtype,
) -> None:
    """What a kernel takes for granted: it reads memory by these numbers alone."""
    check_quant_type(quant_type)
    check_block_size(block_size)
    check_fills_blocks(shape, block_size)
    reference.check_out_dtype(dtype)
    num_values = shape[0] * shape[1]
    if codes_P.numel() * 2 != num_values or blocks_G.numel() * block_size != num_values:
        raise ShapeError(
            f"{codes_P.numel()} bytes and {blocks_G.numel()} blocks of {block_size} do not make "
            f"a weight of {shape[0]} x {shape[1]}"
        )
    _check_dtypes({"codes": codes_P}, torch.uint8)
    if not (codes_P.is_contiguous() and blocks_G.is_contiguous()):
        raise InputError("codes and absmax must be contiguous")


def _check_nested(nested: Sequence[Tensor], block_size: int) -> None:
    if len(nested) != 4 or block_size < 1:
        raise InputError(
            "nested statistics are codes, absmax, levels and offset, in blocks of 1 or more, "
            f"got {len(nested)} tensors in blocks of {block_size}"
        )
    codes_G, absmax, levels, offset = nested
    num_blocks = -(-codes_G.numel() // block_size)
    if (absmax.numel(), levels.numel(), offset.numel()) != (num_blocks, 256, 1):
        raise ShapeError(
            f"{codes_G.numel()} nested codes need {num_blocks} absmax, 256 levels and 1 offset, "
            f"got {absmax.numel()}, {levels.numel()} and {offset.numel()}"
        )
    _check_dtypes({"nested codes": codes_G}, torch.uint8)
    rest = {"nested absmax": absmax, "nested levels": levels, "nested offset": offset}
    _check_dtypes(rest, torch.float32)
    if not (absmax.is_contiguous() and levels.is_contiguous()):
        raise InputError("nested absmax and levels must be contiguous")


def _check_dtypes(tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise InputError(f"{name} must be {dtype}, got {tensor.dtype}")


# Declared by schema: the decorator that infers it from annotations imports the whole compiler
# at the first call, which costs a program that compiles nothing more than a second.
_LAYOUT = "SymInt[] shape, int block_size, str quant_type, ScalarType dtype"
_register(
    "flux_nf4::dequantize_4bit",
    f"(Tensor codes, Tensor absmax, {_LAYOUT}) -> Tensor",
    _run,
    _fake,
)
_register(
    "flux_nf4::dequantize_4bit_nested",
    f"(Tensor codes, Tensor[] nested, int nested_block_size, {_LAYOUT}) -> Tensor",
    _run_nested,
    _fake_nested,
)
