"""What each layout holds, as plans: name -> dtype, shape, and how to make the values.

A plan needs headers alone, but for one question: where a layout has a narrower dtype than the
source (fp8 for T5, fp16 for CLIP, bf16 for biases), the values are read once to see whether they
are all values of the narrower one. Only then it is taken: a conversion loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from flux_nf4.errors import FormatError
from flux_nf4.formats.allinone import PREFIXES, plain_source, quantized_sources, written_names
from flux_nf4.formats.canonical import list_names
from flux_nf4.formats.component import outline, stored_parts
from flux_nf4.formats.forms import (
    FP8_DTYPES,
    Form,
    Piece,
    is_exact,
    is_split,
    split_pieces,
    whole_piece,
)
from flux_nf4.formats.keymap import transformer_table
from flux_nf4.formats.schema import count_numbered, expected_shapes
from flux_nf4.nf4.codec import NF4Weight

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from flux_nf4.formats.component import ComponentKind, Entry
    from flux_nf4.formats.tensorfile import TensorSource

# "parts" is the all-in-one's naming, one part a file and without the prefixes.
Naming: TypeAlias = Literal["all-in-one", "parts", "diffusers"]
# Whether T5 becomes fp8 where a layout has it so: where no value changes, always, or never.
T5Storage: TypeAlias = Literal["exact", "fp8", "keep"]

_NARROW: dict[ComponentKind, torch.dtype] = {"t5": torch.float8_e4m3fn, "clip": torch.float16}
_LABELS = {torch.float8_e4m3fn: "fp8", torch.float16: "fp16", torch.bfloat16: "bf16"}
_ENCODERS: dict[ComponentKind, str] = {"t5": "T5", "clip": "CLIP"}


class Quantizer(Protocol):
    """A way to quantise the matrices of a transformer; `name` is for messages and reports."""

    def quantize(self, name: str, matrix: Tensor) -> NF4Weight:
        """The matrix, quantised."""

    def outline(self, name: str, matrix: Tensor, read: Callable[[], Entry]) -> NF4Weight:
        """What `quantize` would make of a meta tensor, on the meta device; `read` has values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartPlan:
    """The tensors of one part as a layout has them; `notes` tell what a user may wonder about."""

    sources: dict[str, TensorSource]
    notes: tuple[str, ...] = ()


def plan_part(
    kind: ComponentKind,
    entries: Mapping[str, Entry],
    *,
    naming: Naming,
    form: Form = "keep",
    quantizer: Quantizer | None = None,
    t5: T5Storage = "exact",
) -> PartPlan:
    """One part under the names of a layout, every value as it is stored.

    `form` concerns the transformer: its weights as they are, un-nested, or expanded to bf16; with
    a `quantizer` they are quantised, and its vectors take the layout's dtypes, rounded if need be.

    Raises:
        FormatError: a name is unknown or missing, or shapes do not fit each other.
    """
    _check_shapes(kind, entries)
    if kind == "transformer":
        return _plan_transformer(entries, naming, form, quantizer)
    names = written_names(kind, entries)
    start = len(PREFIXES[kind])
    if naming == "diffusers":
        names = {name: name for name in names}
    elif naming == "parts":
        names = {name: full_name[start:] for name, full_name in names.items()}
    pieces = {
        full_name: Piece(entries=entries, name=name, form=_text_form(entries, name))
        for name, full_name in sorted(names.items())
    }
    notes: list[str] = []
    is_expanded = any(piece.form == "bf16" for piece in pieces.values())
    if is_expanded:
        notes.append(
            f"{_ENCODERS[kind]} is expanded from 4 bits, which the transformer alone keeps: each "
            "value is rounded once"
        )
    narrow = None
    if naming != "diffusers" and kind == "t5" and t5 != "exact":
        narrow = _NARROW["t5"] if t5 == "fp8" else None
    elif naming != "diffusers" and kind in _NARROW and not is_expanded:
        narrow = _common_dtype(pieces.values(), _NARROW[kind])
        if narrow is None:
            notes.append(
                f"{_ENCODERS[kind]} stays as it is stored: {_LABELS[_NARROW[kind]]}, which other "
                "all-in-one files have there, would change its values"
            )
    sources: dict[str, TensorSource] = {}
    for full_name, piece in pieces.items():
        sources.update(_plain(full_name, piece, _text_dtype(piece, naming, narrow), naming))
    if naming == "diffusers" and any(
        piece.outline().dtype in FP8_DTYPES for piece in pieces.values()
    ):
        notes.append(
            f"{_ENCODERS.get(kind, 'the VAE')} is written in bf16, as Diffusers reads no fp8; "
            "every value stays the same"
        )
    return PartPlan(sources=sources, notes=tuple(notes))


def _check_shapes(kind: ComponentKind, entries: Mapping[str, Entry]) -> None:
    """What has other shapes would be cut and joined at the wrong rows."""
    shapes = {name: tuple(outline(entries, name).shape) for name in entries}
    expected = expected_shapes(kind, shapes)
    wrong = [name for name, shape in shapes.items() if expected.get(name) != shape]
    if wrong:
        raise FormatError(
            f"the {kind} part has shapes that do not fit each other: {list_names(wrong)}",
            hint="`flux-nf4 verify` tells which each must have; get the file again",
        )


def _text_form(entries: Mapping[str, Entry], name: str) -> Form:
    return "bf16" if isinstance(stored_parts(entries, name)[0], NF4Weight) else "keep"


def _text_dtype(piece: Piece, naming: Naming, narrow: torch.dtype | None) -> torch.dtype:
    stored = piece.outline().dtype
    if naming == "diffusers" and stored in FP8_DTYPES:
        return torch.bfloat16
    return narrow or stored


def _common_dtype(pieces: Iterable[Piece], dtype: torch.dtype) -> torch.dtype | None:
    """`dtype` if it holds every value of every piece."""
    return dtype if all(_holds(piece, dtype) for piece in pieces) else None


def _holds(piece: Piece, dtype: torch.dtype) -> bool:
    # A function of its own, so that one tensor is gone before the next is read.
    if piece.outline().dtype == dtype:
        return True
    entry = piece.read()
    return isinstance(entry, Tensor) and is_exact(entry, dtype)


def _plan_transformer(
    entries: Mapping[str, Entry], naming: Naming, form: Form, quantizer: Quantizer | None
) -> PartPlan:
    pieces = _transformer_pieces(entries, naming, form)
    bias_dtype, scale_dtype = None, None
    if quantizer or is_split(entries) != (naming == "diffusers"):
        # From one dialect to the other, vectors take the dtype that they have there.
        always = quantizer is not None
        bias_dtype, scale_dtype = _vector_dtypes(pieces.values(), naming, always=always)
    sources: dict[str, TensorSource] = {}
    unnested: list[NF4Weight] = []
    for full_name, piece in pieces.items():
        outlined = piece.outline()
        if quantizer and isinstance(outlined, Tensor) and outlined.dim() == 2:
            sources.update(_to_quantize(full_name, piece, quantizer))
            continue
        if isinstance(outlined, NF4Weight):
            sources.update(quantized_sources(full_name, outlined, piece.read))
            if piece.loses_nesting:
                unnested.append(outlined)
            continue
        dtype = bias_dtype if full_name.endswith(".bias") else None
        dtype = scale_dtype if piece.name.endswith(".scale") else dtype
        if naming == "diffusers" and outlined.dtype in FP8_DTYPES:
            dtype = torch.bfloat16
        sources.update(_plain(full_name, piece, dtype or outlined.dtype, naming))
    return PartPlan(sources=sources, notes=_transformer_notes(form, unnested))


def _vector_dtypes(
    pieces: Collection[Piece], naming: Naming, *, always: bool
) -> tuple[torch.dtype | None, torch.dtype | None]:
    """What biases and norms are stored as in a layout; None for those that it cannot hold."""
    bias_dtype = torch.bfloat16
    scale_dtype = torch.bfloat16 if naming == "diffusers" else torch.float32
    if always:
        return bias_dtype, scale_dtype
    return (
        _common_dtype((each for each in pieces if each.name.endswith(".bias")), bias_dtype),
        _common_dtype((each for each in pieces if each.name.endswith(".scale")), scale_dtype),
    )


def _transformer_pieces(
    entries: Mapping[str, Entry], naming: Naming, form: Form
) -> dict[str, Piece]:
    split = is_split(entries)
    full_names = written_names("transformer", entries)
    if naming != "diffusers":
        start = len(PREFIXES["transformer"]) if naming == "parts" else 0
        return {
            full_names[name][start:]: whole_piece(entries, name, form, split=split)
            for name in entries
        }
    table = transformer_table(
        count_numbered(entries, "double_blocks."), count_numbered(entries, "single_blocks.")
    )
    pieces: dict[str, Piece] = {}
    for name in entries:
        theirs = table.names[name]
        cut = split_pieces(entries, name, form, num_pieces=len(theirs), split=split)
        pieces.update(zip(theirs, cut, strict=True))
    return pieces


def _transformer_notes(form: Form, unnested: list[NF4Weight]) -> tuple[str, ...]:
    notes = []
    if unnested:
        num_blocks = sum(weight.codes.numel() * 2 // weight.block_size for weight in unnested)
        notes.append(
            f"{len(unnested)} doubly quantised weights are joined or cut where their statistics "
            f"cannot be, so these are un-nested: no value changes, {num_blocks:,} bytes of "
            f"statistics become {4 * num_blocks:,}"
        )
    if form == "bf16":
        notes.append(
            "each weight is rounded to bf16 once; what is bf16 or fp8 already keeps its value"
        )
    return tuple(notes)


def _plain(
    full_name: str, piece: Piece, dtype: torch.dtype, naming: Naming
) -> dict[str, TensorSource]:
    outlined, as_convolution = piece.outline(), naming != "diffusers"
    assert isinstance(outlined, Tensor)
    source = plain_source(piece.name, outlined, dtype, piece.read, as_convolution=as_convolution)
    return {full_name: source}


def _to_quantize(full_name: str, piece: Piece, quantizer: Quantizer) -> dict[str, TensorSource]:
    name = full_name.removeprefix(PREFIXES["transformer"])
    matrix = piece.outline()
    assert isinstance(matrix, Tensor)
    outlined = quantizer.outline(name, matrix, piece.read)
    return quantized_sources(full_name, outlined, partial(_make_weight, name, piece, quantizer))


def _make_weight(name: str, piece: Piece, quantizer: Quantizer) -> NF4Weight:
    matrix = piece.read()
    assert isinstance(matrix, Tensor)
    return quantizer.quantize(name, matrix)
