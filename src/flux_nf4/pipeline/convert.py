"""Quantise a transformer that is not quantised yet, and compare a wish with what a file holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flux_nf4.errors import FormatError, InputError
from flux_nf4.nf4 import ops
from flux_nf4.nf4.codec import DTYPES, NF4Weight, QuantType, check_quant_type

if TYPE_CHECKING:
    from flux_nf4.formats.component import Component, Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationWish:
    """How the transformer's weights shall be stored; None leaves that open.

    `double_quant` is absmax quantised once more: True is the form called v1, False v2.

    Raises:
        InputError: the quantisation type is unknown.
    """

    quant_type: QuantType | None = None
    double_quant: bool | None = None

    def __post_init__(self) -> None:
        if self.quant_type is not None:
            check_quant_type(self.quant_type)

    def __str__(self) -> str:
        """As `checkpoint.quantization` would name it."""
        version = "" if self.double_quant is None else " v1" if self.double_quant else " v2"
        return f"{self.quant_type or 'nf4'}{version}"


def is_linear_weight(name: str, entry: Entry) -> bool:
    """Whether the transformer's tensor `name` is a Linear layer's weight: 314 are in FLUX.1-dev.

    Every matrix is one; biases and QK norms are vectors.
    """
    return isinstance(entry, NF4Weight) or (name.endswith(".weight") and entry.ndim == 2)


def quantize_component(component: Component, wish: QuantizationWish) -> Component:
    """Give every Linear weight of a transformer the form that is wished for.

    As in the two published files all of them are quantised, embedders and the last layer too.
    What is quantised already is checked, and never quantised a second time.

    Raises:
        InputError: the weights are quantised already, in another form than the wish.
        FormatError: a weight holds NaN or infinity.
    """
    entries = {
        name: _quantize(name, entry, wish) if is_linear_weight(name, entry) else entry
        for name, entry in component.entries.items()
    }
    return dataclasses.replace(component, entries=entries)


def _quantize(name: str, entry: Entry, wish: QuantizationWish) -> NF4Weight:
    if isinstance(entry, NF4Weight):
        disagreement = _disagreement(entry, wish)
        if disagreement:
            raise InputError(
                f"the file's weights are {disagreement}",
                hint=f"wish for what the file holds, or convert it: `flux-nf4 convert` to {wish}",
            )
        return entry
    weight = entry.to(widened(entry.dtype))
    if not weight.isfinite().all():
        raise FormatError(f"`{name}` holds NaN or infinity and cannot be quantised")
    return ops.quantize(weight, quant_type=wish.quant_type or "nf4", nested=bool(wish.double_quant))


def widened(dtype: torch.dtype) -> torch.dtype:
    """What a matrix of this dtype is quantised from; fp8 is widened, exactly."""
    return dtype if dtype in DTYPES else torch.bfloat16


def _disagreement(weight: NF4Weight, wish: QuantizationWish) -> str:
    if wish.quant_type is not None and weight.quant_type != wish.quant_type:
        return f"{weight.quant_type}, and `bnb_4bit_quant_type` asks for {wish.quant_type}"
    if wish.double_quant is not None and weight.is_nested != wish.double_quant:
        held = "doubly quantised (v1)" if weight.is_nested else "not doubly quantised (v2)"
        return f"{held}, and `bnb_4bit_use_double_quant` is {wish.double_quant}"
    return ""
