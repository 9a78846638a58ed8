"""One entry of a part in another form: joined, cut, un-nested or expanded, and nothing lost.

Every input width of FLUX is a multiple of 64, so rows own whole bytes and whole blocks: joining and
cutting packed rows is exact. Nested statistics (v1) are kept nested where that is exact too: cut at
a multiple of 256 blocks, joined where the parts share one offset and one map.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from flux_nf4.formats.component import Entry, Parts, join, stored_parts
from flux_nf4.formats.keymap import SWAPPED_HALVES
from flux_nf4.nf4 import ops
from flux_nf4.nf4.codec import NestedAbsmax, NF4Weight

if TYPE_CHECKING:
    from collections.abc import Mapping

Form: TypeAlias = Literal["keep", "v2", "bf16"]

# The dtypes that Diffusers and transformers do not compute in; bf16 holds each of their values.
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def is_split(entries: Mapping[str, Entry]) -> bool:
    """Whether a transformer is stored as Diffusers does, with q, k and v apart."""
    return any(len(stored_parts(entries, name)) > 1 for name in entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One tensor or weight to be written, made from a stored entry when its turn comes.

    `part` is the index of a stored piece (None: all of them, joined); `rows` a range to cut out
    (None: all); `swap` says that the halves of the rows change places.
    """

    entries: Mapping[str, Entry]
    name: str
    form: Form = "keep"
    part: int | None = None
    rows: tuple[int, int] | None = None
    swap: bool = False

    def read(self) -> Entry:
        """The values."""
        return reform(self._exact(self._stored()), self.form)

    def outline(self) -> Entry:
        """Its shape and form on the meta device; reads no values."""
        stored = self._stored()
        parts = tuple(part.to("meta") for part in stored)
        return reform(self._exact(parts, keep_nested=can_join_nested(stored)), self.form)

    @property
    def loses_nesting(self) -> bool:
        """Whether nested statistics are un-nested only because rows are joined or cut."""
        was_nested = any(_is_nested(part) for part in self._stored())
        return self.form == "keep" and was_nested and not _is_nested(self.outline())

    def _stored(self) -> Parts:
        parts = stored_parts(self.entries, self.name)
        return parts if self.part is None else (parts[self.part],)

    def _exact(self, parts: Parts, *, keep_nested: bool | None = None) -> Entry:
        entry = join_rows(parts, keep_nested=keep_nested)
        if self.swap:
            middle = entry.shape[0] // 2
            halves = cut_rows(entry, middle, entry.shape[0]), cut_rows(entry, 0, middle)
            entry = join_rows(halves, keep_nested=all(_is_nested(half) for half in halves))
        return entry if self.rows is None else cut_rows(entry, *self.rows)


def whole_piece(entries: Mapping[str, Entry], name: str, form: Form, *, split: bool) -> Piece:
    """An entry of a transformer under BFL's name, joined from whatever it is stored as."""
    swap = split and name in SWAPPED_HALVES
    return Piece(entries=entries, name=name, form=form, swap=swap)


def split_pieces(
    entries: Mapping[str, Entry], name: str, form: Form, *, num_pieces: int, split: bool
) -> tuple[Piece, ...]:
    """An entry of a transformer as the pieces that Diffusers stores, in the order of the rows."""
    if split:
        return tuple(
            Piece(entries=entries, name=name, form=form, part=part) for part in range(num_pieces)
        )
    if num_pieces == 1:
        return (Piece(entries=entries, name=name, form=form, swap=name in SWAPPED_HALVES),)
    num_rows = stored_parts(entries, name)[0].shape[0]
    # q, k and v have one width, `linear1` the rest after them.
    hidden_size = _hidden_size(entries)
    starts = [hidden_size * part for part in range(num_pieces)]
    stops = [*starts[1:], num_rows]
    return tuple(
        Piece(entries=entries, name=name, form=form, rows=rows)
        for rows in zip(starts, stops, strict=True)
    )


def _hidden_size(entries: Mapping[str, Entry]) -> int:
    return stored_parts(entries, "img_in.weight")[0].shape[0]


def reform(entry: Entry, form: Form) -> Entry:
    """An entry as `form` has it: `v2` un-nests, exactly; `bf16` expands and rounds matrices."""
    if isinstance(entry, NF4Weight):
        if form == "bf16":
            if entry.codes.is_meta:
                return torch.empty(entry.shape, dtype=torch.bfloat16, device="meta")
            return ops.dequantize(entry, torch.bfloat16)
        return entry.with_float_absmax() if form == "v2" and entry.is_nested else entry
    return entry.to(torch.bfloat16) if form == "bf16" and entry.dim() == 2 else entry


def cut_rows(entry: Entry, start: int, stop: int) -> Entry:
    """Rows `start` to `stop`, exact; nested statistics stay nested where their blocks allow it."""
    if isinstance(entry, Tensor):
        return entry[start:stop]
    nested = entry.absmax
    if not isinstance(nested, NestedAbsmax):
        return entry.rows(start, stop)
    num_in = entry.shape[1]
    unit = nested.block_size
    first, last = start * num_in // entry.block_size, stop * num_in // entry.block_size
    ends_with_the_weight = last == nested.codes.numel()
    if num_in % entry.block_size or first % unit or (last % unit and not ends_with_the_weight):
        return entry.rows(start, stop)
    return dataclasses.replace(
        entry,
        codes=entry.codes[start * num_in // 2 : stop * num_in // 2],
        absmax=dataclasses.replace(
            nested,
            codes=nested.codes[first:last],
            absmax=nested.absmax[first // unit : -(-last // unit)],
        ),
        shape=(stop - start, num_in),
    )


def can_join_nested(parts: Parts) -> bool:
    """Whether nested statistics join without un-nesting: one offset, one map, whole blocks."""
    absmaxes = [part.absmax for part in parts if isinstance(part, NF4Weight)]
    nested = [absmax for absmax in absmaxes if isinstance(absmax, NestedAbsmax)]
    if len(nested) < len(parts):
        return False
    first = nested[0]
    are_alike = all(
        (each.offset, each.block_size) == (first.offset, first.block_size)
        and torch.equal(each.levels, first.levels)
        for each in nested[1:]
    )
    return are_alike and all(each.codes.numel() % first.block_size == 0 for each in nested[:-1])


def join_rows(parts: Parts, *, keep_nested: bool | None = None) -> Entry:
    """Parts joined along their rows, exact; `keep_nested` None finds out if they can stay so.

    Parts on the meta device have no values to find out from, and so must be told.
    """
    if keep_nested is None:
        keep_nested = can_join_nested(parts)
    if len(parts) == 1 or not keep_nested:
        return join(parts)
    weights = [part for part in parts if isinstance(part, NF4Weight)]
    nested = [weight.absmax for weight in weights if isinstance(weight.absmax, NestedAbsmax)]
    return dataclasses.replace(
        weights[0],
        codes=torch.cat([weight.codes for weight in weights]),
        absmax=dataclasses.replace(
            nested[0],
            codes=torch.cat([each.codes for each in nested]),
            absmax=torch.cat([each.absmax for each in nested]),
        ),
        shape=(sum(weight.shape[0] for weight in weights), weights[0].shape[1]),
    )


def _is_nested(entry: Entry) -> bool:
    return isinstance(entry, NF4Weight) and entry.is_nested


def is_exact(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether every value of a tensor is a value of `dtype` too."""
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return torch.equal(wide.to(dtype).to(wide.dtype), wide)
