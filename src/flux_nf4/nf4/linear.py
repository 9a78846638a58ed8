"""A linear layer that keeps its weight in NF4 and expands it at every use.

Equals `F.linear` on the dequantised weight, bit for bit. The trade-off: expanding costs time at
every call, and saves three quarters of the memory; nothing expanded outlives a call, not even
between a forward and its backward, where it is expanded again.

In `fp8` or `int8` arithmetic (`set_arithmetic`) the weight is expanded to 8 bits instead, and the
input is quantised token by token; a caller that has fused that into its own kernel hands over
`QuantizedRows` to `multiply`. With gradients it stays exact. `forward` and `multiply` are the only
ways to a product: a low-rank side path (LoRA) would be added at the end of these two.

The weight itself is frozen: gradients reach the input, never the codes.

Shape letters, in this module only:
    N  out features     G  blocks, N*K / block_size     *  any leading dimensions
    K  in features      P  bytes, N*K / 2
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from flux_nf4.errors import InputError, ShapeError
from flux_nf4.nf4 import eight_bit, ops
from flux_nf4.nf4.codec import NESTED_BLOCK_SIZE, NestedAbsmax, NF4Weight, QuantType, decode_absmax
from flux_nf4.nf4.eight_bit import Arithmetic, QuantizedRows

_NESTED = ("nested_codes", "nested_absmax", "nested_levels", "nested_offset")


class NF4Linear(nn.Module):
    """`nn.Linear` with an NF4 weight: x (*, K) -> (*, N), computed in x's dtype.

    State: `codes`, and `absmax` (v2) or `nested_codes`, `nested_absmax`, `nested_levels`,
    `nested_offset` (v1), and `bias` if there is one. They move with `.to(device)`, but no
    `.to(dtype)` casts them: what the state holds is what the file holds.
    """

    codes: Tensor
    absmax: Tensor
    nested_codes: Tensor
    nested_absmax: Tensor
    nested_levels: Tensor
    nested_offset: Tensor
    bias: Tensor | None

    def __init__(self, weight: NF4Weight, bias: Tensor | None = None) -> None:
        """Take over the tensors of `weight` without copying them.

        Raises:
            ShapeError: `bias` is not (N,).
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ShapeError(
                f"bias must have shape ({self.out_features},), got {tuple(bias.shape)}"
            )
        self.block_size = weight.block_size
        self.quant_type: QuantType = weight.quant_type
        self.dtype = weight.dtype
        self.is_nested = weight.is_nested
        self.nested_block_size = NESTED_BLOCK_SIZE
        self.arithmetic: Arithmetic = "bf16"
        # The kernels take for granted what `NF4Weight` has checked, and that nothing has gaps.
        self.register_buffer("codes", weight.codes.contiguous())
        if isinstance(weight.absmax, NestedAbsmax):
            self.nested_block_size = weight.absmax.block_size
            for name, tensor in zip(_NESTED, weight.absmax.tensors(), strict=True):
                self.register_buffer(name, tensor.contiguous())
        else:
            self.register_buffer("absmax", weight.absmax.contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach())
        # Of the 8-bit rows, and their reciprocals. No buffers: they follow from the weight.
        self._row_scales: tuple[Tensor, Tensor] | None = None

    @property
    def weight(self) -> NF4Weight:
        """The weight as data; it shares memory with the layer."""
        absmax: Tensor | NestedAbsmax
        if self.is_nested:
            absmax = NestedAbsmax(
                codes=self.nested_codes,
                absmax=self.nested_absmax,
                levels=self.nested_levels,
                offset=float(self.nested_offset),
                block_size=self.nested_block_size,
            )
        else:
            absmax = self.absmax
        return NF4Weight(
            codes=self.codes,
            absmax=absmax,
            shape=(self.out_features, self.in_features),
            block_size=self.block_size,
            quant_type=self.quant_type,
            dtype=self.dtype,
        )

    def expand(self, dtype: torch.dtype) -> Tensor:
        """The dequantised weight, () -> (N, K) `dtype`."""
        layout = ((self.out_features, self.in_features), self.block_size, self.quant_type, dtype)
        if not self.is_nested:
            return ops.dequantize_4bit(self.codes, self.absmax, *layout)
        nested = self._absmax_tensors()
        return ops.dequantize_4bit_nested(self.codes, nested, self.nested_block_size, *layout)

    @property
    def fits_eight_bit(self) -> bool:
        """Whether rows end where blocks do, and the 8-bit products take a matrix of this size."""
        return self.in_features % self.block_size == 0 and self.out_features % 16 == 0

    def set_arithmetic(self, arithmetic: Arithmetic) -> None:
        """Choose how to multiply where no gradients are wanted.

        Raises:
            InputError: the weight does not fit 8-bit arithmetic.
        """
        if arithmetic != "bf16" and not self.fits_eight_bit:
            raise InputError(
                f"a weight of {self.out_features} x {self.in_features} cannot be multiplied in "
                f"`{arithmetic}`",
                hint="leave this layer in `bf16`",
            )
        self.arithmetic, self._row_scales = arithmetic, None

    def row_scales(self) -> tuple[Tensor, Tensor]:
        """What a unit of each row's 8-bit values is worth, and its reciprocal: (N,) float32.

        Worked out at first use, when the weight is on its device, and kept: a weight may leave the
        device and come back.
        """
        if self._row_scales is None:
            absmax = self._absmax_tensors()
            absmax_G = (
                decode_absmax(absmax, self.nested_block_size) if self.is_nested else absmax[0]
            )
            layout = ((self.out_features, self.in_features), self.block_size, self.quant_type)
            scale_N = eight_bit.row_scale(self.codes, absmax_G, *layout, self.arithmetic)
            self._row_scales = scale_N, 1 / scale_N
        return self._row_scales

    def _absmax_tensors(self) -> list[Tensor]:
        if not self.is_nested:
            return [self.absmax]
        return [self.nested_codes, self.nested_absmax, self.nested_levels, self.nested_offset]

    def expand_for_product(
        self, dtype: torch.dtype, inverse_scale_N: Tensor | None = None
    ) -> Tensor:
        """The weight for one use, in units of the rows' scales where their reciprocals are given.

        () -> (N, K) `dtype`, which may lie in a buffer that the next layer writes to.
        """
        return ops.expand_for_product(
            self.codes,
            self._absmax_tensors(),
            self.nested_block_size,
            inverse_scale_N,
            (self.out_features, self.in_features),
            self.block_size,
            self.quant_type,
            dtype,
        )

    def multiply(self, rows: QuantizedRows, dtype: torch.dtype) -> Tensor:
        """Multiply rows that are in this layer's 8-bit arithmetic already.

        rows (*, K) -> (*, N) `dtype`.
        """
        scale_N, inverse_scale_N = self.row_scales()
        w_NK = self.expand_for_product(eight_bit.eight_bit_dtype(self.arithmetic), inverse_scale_N)
        return ops.multiply(rows, w_NK, scale_N, self.bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight, add the bias.

        x (*, K) -> (*, N), in x's dtype.

        Raises:
            ShapeError: the last dimension of `x` is not K.
            InputError: the dtype of `x` is not one that weights expand to.
        """
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ShapeError(
                f"the input's last dimension must be {self.in_features}, got {tuple(x.shape)}"
            )
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            return _FrozenLinear.apply(x, bias, self.expand)  # type: ignore[no-untyped-call]
        if torch.compiler.is_compiling():
            return functional.linear(x, self.expand(x.dtype), bias)
        if self.arithmetic != "bf16":
            return self.multiply(eight_bit.quantize_rows(x, self.arithmetic), x.dtype)
        return functional.linear(x, self.expand_for_product(x.dtype), bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to(dtype)`, `.half()` and their kin come through here. Follow them to another device,
        # but keep each dtype: absmax in bfloat16 would move every weight by up to 0.39 %.
        self._row_scales = None
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._row_scales = None  # of another weight
        super()._load_from_state_dict(*arguments)

    def extra_repr(self) -> str:
        """The arguments that `repr` shows."""
        nested = ", nested" if self.is_nested else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.quant_type}, block_size={self.block_size}{nested}"
        )


class _FrozenLinear(torch.autograd.Function):
    """`F.linear` whose backward expands the weight again instead of keeping it."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, expand: Callable[[torch.dtype], Tensor]) -> Tensor:
        """As `F.linear`: x (*, K) -> (*, N)."""
        return functional.linear(x, expand(x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        """Keep the way to the weight, not the weight."""
        ctx.expand = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Gradient (*, N) -> (*, K); none for the bias and the weight."""
        (gradient,) = gradients
        return gradient @ ctx.expand(gradient.dtype), None, None
