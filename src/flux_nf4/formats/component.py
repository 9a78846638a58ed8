"""One part of a model in memory: canonical names, and tensors or NF4 weights under them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from flux_nf4.errors import FormatError
from flux_nf4.formats.keymap import Kind
from flux_nf4.nf4.codec import NF4Weight, concatenate_rows

if TYPE_CHECKING:
    from pathlib import Path

    from flux_nf4.formats.tensorfile import TensorFile

ComponentKind: TypeAlias = Kind
Entry: TypeAlias = Tensor | NF4Weight
Parts: TypeAlias = tuple[Entry, ...]

COMPONENT_KINDS: tuple[ComponentKind, ...] = ("transformer", "t5", "clip", "vae")

# What a plain tensor may be stored as, and what people call it.
STORED_AS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8 e5m2",
}


def stored_as(entry: Entry) -> str:
    """How one entry is stored, in the words of `STORED_AS`, or `nf4 v1`, `nf4 v2`, `fp4`."""
    if isinstance(entry, Tensor):
        return STORED_AS.get(entry.dtype, str(entry.dtype).removeprefix("torch."))
    if entry.quant_type == "fp4":
        return "fp4"
    return "nf4 v1" if entry.is_nested else "nf4 v2"


def entry_bytes(entry: Entry) -> int:
    """How many bytes one entry takes, its statistics included."""
    return entry.nbytes if isinstance(entry, Tensor) else entry.num_bytes


class Entries(Mapping[str, Entry]):
    """Entries whose parts are joined only when they are read.

    Diffusers keeps q, k and v apart and BFL fuses them. Joining copies, and a file on the disk
    need not be copied before its turn comes: `parts` shows what is stored, reading a name joins.
    Joining is exact, for packed codes too.

    Raises:
        FormatError: the parts of one entry do not fit each other.
    """

    def __init__(
        self, parts: Mapping[str, Parts], swapped_halves: frozenset[str] = frozenset()
    ) -> None:
        self._parts = dict(parts)
        self._swapped_halves = swapped_halves
        for name, joined in self._parts.items():
            _check_parts(name, joined, name in swapped_halves)

    def parts(self, name: str) -> Parts:
        """The entry as it is stored, in the order of its rows."""
        return self._parts[name]

    def __getitem__(self, name: str) -> Entry:
        return self._joined(name, self._parts[name])

    def __contains__(self, name: object) -> bool:
        return name in self._parts  # Mapping's own would read and join

    def outline(self, name: str) -> Entry:
        """The entry on the meta device: its shape and form, read from no disk."""
        return self._joined(name, tuple(part.to("meta") for part in self._parts[name]))

    def _joined(self, name: str, parts: Parts) -> Entry:
        if name in self._swapped_halves:
            first, second = _halves(parts[0])
            parts = (second, first)
        return join(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def stored_parts(entries: Mapping[str, Entry], name: str) -> Parts:
    """An entry as it is stored: itself, or the pieces that reading it would join."""
    return entries.parts(name) if isinstance(entries, Entries) else (entries[name],)


def outline(entries: Mapping[str, Entry], name: str) -> Entry:
    """An entry on the meta device: its shape and form, without reading or joining values."""
    if isinstance(entries, Entries):
        return entries.outline(name)
    return entries[name].to("meta")


def _check_parts(name: str, parts: Parts, is_swapped: bool) -> None:
    forms = {
        (tuple(part.shape[1:]), part.dtype, None)
        if isinstance(part, Tensor)
        else (part.shape[1:], part.dtype, (part.quant_type, part.block_size))
        for part in parts
    }
    if len(forms) > 1 or any(not part.shape for part in parts):
        stored = ", ".join(f"{stored_as(part)} {list(part.shape)}" for part in parts)
        raise FormatError(f"the parts of `{name}` do not fit each other: {stored}")
    if is_swapped:
        rows, *rest = parts[0].shape
        unit = 1 if isinstance(parts[0], Tensor) else parts[0].block_size
        if rows % 2 or (rest and rest[0] % unit):
            raise FormatError(f"`{name}` of shape {list(parts[0].shape)} has no two halves")


def _halves(entry: Entry) -> tuple[Entry, Entry]:
    middle = entry.shape[0] // 2
    if isinstance(entry, Tensor):
        return entry[:middle], entry[middle:]
    return entry.rows(0, middle), entry.rows(middle, entry.shape[0])


def join(parts: Parts) -> Entry:
    """Parts joined along their rows, exact; nested statistics of several are un-nested."""
    if len(parts) == 1:
        return parts[0]
    weights = [part for part in parts if isinstance(part, NF4Weight)]
    if weights:
        return concatenate_rows(weights)
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How much of a part is stored in one way."""

    num_tensors: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """The tensors of one part under their canonical names, whatever file they came from.

    transformer: BFL's names. t5: Hugging Face's `T5EncoderModel` names. clip: `text_model.*`, and
    `text_projection.weight` where the file has it. vae: Diffusers' `AutoencoderKL` names.
    `source` is the file, or the folder of a part kept in several; `files` are those files, open.
    """

    kind: ComponentKind
    entries: Mapping[str, Entry]
    source: Path
    files: tuple[TensorFile, ...] = ()

    def parts(self, name: str) -> Parts:
        """An entry as it is stored: itself, or the pieces that reading it would join."""
        return stored_parts(self.entries, name)

    def summary(self, *, matrices_only: bool = False) -> dict[str, Stored]:
        """How it is stored -> how much, the most bytes first; reads headers only."""
        pieces = [part for name in self.entries for part in self.parts(name)]
        if matrices_only:
            pieces = [piece for piece in pieces if len(piece.shape) == 2]
        return _add_up(pieces)

    @property
    def num_bytes(self) -> int:
        """How many bytes its entries take, as stored."""
        return sum(stored.num_bytes for stored in self.summary().values())


def _add_up(pieces: Iterable[Entry]) -> dict[str, Stored]:
    counts: dict[str, int] = {}
    num_bytes: dict[str, int] = {}
    for piece in pieces:
        label = stored_as(piece)
        counts[label] = counts.get(label, 0) + 1
        num_bytes[label] = num_bytes.get(label, 0) + entry_bytes(piece)
    ordered = sorted(counts, key=lambda label: (-num_bytes[label], label))
    return {
        label: Stored(num_tensors=counts[label], num_bytes=num_bytes[label]) for label in ordered
    }
