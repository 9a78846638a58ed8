"""Run by test_triton_kernels.py in a process of its own: TRITON_INTERPRET counts at import only.

Compares the kernels with the reference over awkward shapes, and exits with what differs.
"""

import itertools
import sys

import interpreter
import torch
from torch import Tensor

from flux_nf4.nf4 import eight_bit, reference, triton_int8, triton_kernels
from flux_nf4.nf4.codec import NestedAbsmax, NF4Weight, QuantType
from flux_nf4.nf4.linear import NF4Linear

SHAPES = [(1, 64), (1, 128), (3, 64), (33, 64), (31, 192), (65, 128), (2, 2112), (16, 128), (4, 32)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
QUANT_TYPES: list[QuantType] = ["nf4", "fp4"]
# Rows, in, out: every tile of the int8 product partly empty, and a row of tiles alone.
PRODUCTS = [(1, 64, 16), (7, 192, 48), (130, 128, 144), (1100, 64, 16)]


def random_weights():
    cases = itertools.product(SHAPES, [64, 128], QUANT_TYPES, [False, True])
    for shape, block_size, quant_type, nested in cases:
        if shape[0] * shape[1] % block_size:
            continue
        generator = torch.Generator().manual_seed(shape[0])
        w_NK = torch.randn(shape, generator=generator)
        yield reference.quantize(w_NK, block_size=block_size, quant_type=quant_type, nested=nested)


def by_kernel(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    layout = (weight.shape, weight.block_size, weight.quant_type, dtype)
    if isinstance(weight.absmax, NestedAbsmax):
        nested = weight.absmax.tensors()
        return triton_kernels.expand_nested(weight.codes, nested, 256, *layout)
    return triton_kernels.expand(weight.codes, weight.absmax, *layout)


def is_right_in_eight_bits(weight: NF4Weight, arithmetic: eight_bit.Arithmetic) -> bool:
    if weight.shape[1] % weight.block_size:
        return True
    absmax_G = weight.float_absmax()
    if not isinstance(weight.absmax, NestedAbsmax):
        # A scale search may leave negative ones.
        absmax_G[::3] *= -1
        weight = NF4Weight(
            codes=weight.codes,
            absmax=absmax_G,
            shape=weight.shape,
            block_size=weight.block_size,
            quant_type=weight.quant_type,
        )
    layout = (weight.shape, weight.block_size, weight.quant_type)
    inverse_N = 1 / eight_bit.row_scale(weight.codes, absmax_G, *layout, arithmetic)
    dtype = eight_bit.eight_bit_dtype(arithmetic)
    expected = eight_bit.expand(weight.codes, absmax_G, inverse_N, *layout, dtype)
    absmax = NF4Linear(weight)._absmax_tensors()
    out = triton_kernels.expand_into(
        torch.empty(weight.shape, dtype=dtype), weight.codes, absmax, 256, inverse_N, *layout[1:]
    )
    return torch.equal(out.view(torch.uint8), expected.view(torch.uint8))


def is_right_product(num_rows: int, num_in: int, num_out: int, bias: bool) -> bool:
    generator = torch.Generator().manual_seed(num_rows)
    x_MK, w_NK = (
        torch.randint(-127, 128, (rows, num_in), dtype=torch.int8, generator=generator)
        for rows in (num_rows, num_out)
    )
    x_scale_M1, w_scale_N = (
        torch.rand(size, generator=generator) for size in ((num_rows, 1), num_out)
    )
    bias_N = torch.randn(num_out, generator=generator) if bias else None
    operands = (x_MK, x_scale_M1, w_NK, w_scale_N, bias_N, torch.float32)
    return torch.equal(triton_int8.multiply_int8(*operands), eight_bit.multiply(*operands))


def main() -> None:
    assert interpreter.TYPES
    wrong: list[object] = []
    for weight in random_weights():
        case = (weight.shape, weight.block_size, weight.quant_type, weight.is_nested)
        wrong += [
            (*case, dtype)
            for dtype in DTYPES
            if not torch.equal(by_kernel(weight, dtype), reference.dequantize(weight, dtype))
        ]
        wrong += [
            (*case, arithmetic)
            for arithmetic in ("fp8", "int8")
            if not is_right_in_eight_bits(weight, arithmetic)
        ]
    wrong += [
        (*sizes, bias)
        for sizes, bias in itertools.product(PRODUCTS, [False, True])
        if not is_right_product(*sizes, bias)
    ]
    sys.exit(f"kernels differ from the reference for {wrong}" if wrong else 0)


main()
