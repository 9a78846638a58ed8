"""Triton's interpreter, made to round as a GPU does. Import it before any kernel.

Whoever imports this runs in a process of his own with TRITON_INTERPRET=1, which counts at import
only. The interpreter cuts float32 to bfloat16, and to 8 bits nearly so; a GPU rounds to nearest.
It multiplies matrices of bfloat16 as if their bits were integers; here they become float32 first.
It reduces by functions of ours value by value; here it folds a vector in halves, which is faster.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TYPES = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}

_convert = interpreter._convert_float


def convert_rounded(value, from_type, to_type, rounding_mode):
    if from_type != tl.float32 or to_type not in TYPES:
        return _convert(value, from_type, to_type, rounding_mode)
    rounded = torch.from_numpy(np.array(value, dtype=np.float32)).to(TYPES[to_type])
    bits = rounded.view(torch.uint8 if rounded.itemsize == 1 else torch.int16)
    return bits.numpy().view(np.uint8 if rounded.itemsize == 1 else np.uint16)


interpreter._convert_float = convert_rounded

_dot = interpreter.InterpreterBuilder.create_dot


def dot_of_values(self, a, b, *rest):
    return _dot(self, *(as_float32(each) for each in (a, b)), *rest)


def as_float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


interpreter.InterpreterBuilder.create_dot = dot_of_values

_reduce = interpreter.ReduceOps.generic_reduce


def reduced_in_halves(self, values):
    if len(values) > 1 or len(values[0].shape) > 1:
        return _reduce(self, values)
    data, dtype = values[0].handle.data, values[0].dtype
    while len(data) > 1:
        halves = (self.to_tensor(half, dtype) for half in np.split(data, 2))
        data = self.combine_fn.fn(*halves).handle.data
    return [self.to_tensor(data.item(), dtype)]


interpreter.ReduceOps.generic_reduce = reduced_in_halves


def use_kernels_on_the_cpu():
    """Every door takes the kernels for tensors on the CPU."""
    from flux_nf4.model import fused, fused_kernels
    from flux_nf4.nf4 import ops, triton_kernels

    ops._implementation = lambda device_type: triton_kernels
    fused.kernels = lambda device_type: fused_kernels
