"""Run by test_triton_kernels.py in a process of its own: TRITON_INTERPRET counts at import only.

Compares the kernels with the reference over awkward shapes, and exits with what differs.
"""

import itertools
import sys

import torch
from torch import Tensor

from flux_nf4.nf4 import reference, triton_kernels
from flux_nf4.nf4.codec import NestedAbsmax, NF4Weight, QuantType

SHAPES = [(1, 64), (1, 128), (3, 64), (33, 64), (31, 192), (65, 128), (2, 2112), (16, 128), (4, 32)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
QUANT_TYPES: list[QuantType] = ["nf4", "fp4"]


def by_kernel(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    layout = (weight.shape, weight.block_size, weight.quant_type, dtype)
    if isinstance(weight.absmax, NestedAbsmax):
        nested = weight.absmax.tensors()
        return triton_kernels.expand_nested(weight.codes, nested, 256, *layout)
    return triton_kernels.expand(weight.codes, weight.absmax, *layout)


def by_reference(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    if dtype != torch.bfloat16:
        return reference.dequantize(weight, dtype)
    # The interpreter cuts float32 to bfloat16 where a GPU rounds; tests/gpu sees the rounding.
    bits = reference.dequantize(weight, torch.float32).view(torch.int32) & -(2**16)
    return bits.view(torch.float32).to(torch.bfloat16)


def main() -> None:
    wrong = []
    cases = itertools.product(SHAPES, [64, 128], QUANT_TYPES, [False, True])
    for shape, block_size, quant_type, nested in cases:
        if shape[0] * shape[1] % block_size:
            continue
        generator = torch.Generator().manual_seed(shape[0])
        w_NK = torch.randn(shape, generator=generator)
        weight = reference.quantize(
            w_NK, block_size=block_size, quant_type=quant_type, nested=nested
        )
        wrong += [
            (shape, block_size, quant_type, nested, dtype)
            for dtype in DTYPES
            if not torch.equal(by_kernel(weight, dtype), by_reference(weight, dtype))
        ]
    sys.exit(f"kernels differ from the reference for {wrong}" if wrong else 0)


main()
