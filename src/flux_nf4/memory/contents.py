"""What units are made of: the tensors of modules that were built without any, and their values.

A unit is one flat buffer of bytes, and the tensors of its modules are views into it: one copy
moves a whole block, nothing fragments, and where a unit lies can change between two uses. Values
come from the checkpoint: bytes that the file has as they are wanted go from the file into the
buffer with nothing in between; what must be cast or joined is made on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flux_nf4.formats.bnb import check_is_finite
from flux_nf4.formats.component import Component, Entry
from flux_nf4.memory.inventory import FIXED, T5_TOKENS, Inventory, Unit, unit_of
from flux_nf4.nf4.codec import NestedAbsmax

if TYPE_CHECKING:
    from flux_nf4.formats.component import ComponentKind
    from flux_nf4.formats.tensorfile import TensorFile

ALIGNMENT = 256  # of a tensor in its buffer: that of cudaMalloc, as vector loads and TMA want it
READ_BYTES = 1 << 22  # what one thread reads at a time: a block of 85 MB keeps 16 of them busy

# The entry behind the path of a module, for the modules that the `build_` functions give.
_ENTRY_PATH: Mapping[ComponentKind, Callable[[str], str]] = {
    "transformer": lambda path: path.partition(".")[2],
    "t5": lambda path: path.removeprefix("model."),
    "clip": lambda path: "text_model." + path.removeprefix("model.").removeprefix("text_model."),
    "vae": lambda path: path.removeprefix("model."),
}
_NESTED = ("nested_codes", "nested_absmax", "nested_levels", "nested_offset")
_OF_WEIGHT = frozenset(("codes", "absmax", *_NESTED, "stored"))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Place:
    """One tensor of a module: whose and which it is, and where its bytes begin in the unit."""

    owner: nn.Module
    leaf: str
    outline: Tensor
    component: Component
    entry_name: str
    offset: int

    def view(self, buffer: Tensor) -> Tensor:
        """Its part of the unit's buffer."""
        part = buffer[self.offset : self.offset + self.outline.nbytes]
        return part.view(self.outline.dtype).view(self.outline.shape)

    def put(self, view: Tensor | None) -> None:
        """Make the module use a tensor; None: it has none, and whoever uses it gets an error."""
        parameters = self.owner._parameters
        if self.leaf not in parameters:
            self.owner._buffers[self.leaf] = view
        elif view is None or isinstance(view, nn.Parameter):
            parameters[self.leaf] = view
        else:
            parameters[self.leaf] = nn.Parameter(view, requires_grad=False)

    def value(self, entry: Entry) -> Tensor:
        """The tensor's values, of the entry that holds them."""
        if isinstance(entry, Tensor):
            return entry
        absmax = entry.absmax
        if self.leaf == "codes":
            return entry.codes
        if isinstance(absmax, NestedAbsmax):
            return absmax.tensors()[_NESTED.index(self.leaf)]
        return absmax


@dataclass(slots=True, kw_only=True, eq=False)
class Contents:
    """A unit's tensors."""

    places: list[Place] = field(default_factory=list)
    num_bytes: int = 0
    is_checked: bool = False

    def add(self, owner: nn.Module, leaf: str, component: Component, entry_name: str) -> None:
        """Take in a tensor of a module, which is still on meta."""
        outline = getattr(owner, leaf)
        place = Place(
            owner=owner,
            leaf=leaf,
            outline=outline,
            component=component,
            entry_name=entry_name,
            offset=self.num_bytes,
        )
        self.places.append(place)
        self.num_bytes += -(-outline.nbytes // ALIGNMENT) * ALIGNMENT

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Every tensor, in a buffer of at least `num_bytes`."""
        return [place.view(buffer) for place in self.places]

    def put(self, views: list[Tensor]) -> None:
        """Make the modules use these tensors."""
        for place, view in zip(self.places, views, strict=True):
            place.put(view)

    def take_away(self) -> None:
        """Leave the modules without tensors: a product with one on meta is no error, but noise."""
        for place in self.places:
            place.put(None)

    def fill(self, buffer: Tensor, threads: Executor) -> None:
        """Bring the values into host memory.

        Raises:
            FormatError: a file could not be read, or holds NaN or infinity for absmax.
        """
        reads: list[Future[None]] = []
        name, entry = "", None
        for place in self.places:
            # The tensors of one entry follow one another: what is joined is joined once.
            if entry is None or place.entry_name != name:
                name, entry = place.entry_name, place.component.entries[place.entry_name]
            value, view = place.value(entry), place.view(buffer)
            found = _find(place.component, value) if value.dtype == view.dtype else None
            if found is None:
                view.copy_(value)
                continue
            file, start = found
            target = view.flatten().view(torch.uint8).numpy().data
            for first in range(0, len(target), READ_BYTES):
                piece = target[first : first + READ_BYTES]
                reads.append(threads.submit(file.read_into, piece, start + first))
        for read in reads:
            read.result()
        if not self.is_checked:
            self._check(buffer)
            self.is_checked = True

    def _check(self, buffer: Tensor) -> None:
        for place in self.places:
            if place.leaf in ("absmax", "nested_absmax"):
                check_is_finite(place.entry_name, place.view(buffer))


def _find(component: Component, value: Tensor) -> tuple[TensorFile, int] | None:
    """The file that holds these values as they are, and where."""
    for file in component.files:
        offset = file.offset_of(value)
        if offset is not None:
            return file, offset
    return None


def take_contents(
    parts: Mapping[ComponentKind, tuple[nn.Module, Component]],
) -> dict[str, Contents]:
    """Sort the tensors of modules that were built on meta into units, by name."""
    units: dict[str, Contents] = {}
    for kind, (module, component) in parts.items():
        for path, owner in module.named_modules():
            for leaf, _ in (
                *owner.named_buffers(recurse=False),
                *owner.named_parameters(recurse=False),
            ):
                stored = "weight" if leaf in _OF_WEIGHT else leaf
                entry_name = _ENTRY_PATH[kind](f"{path}.{stored}")
                num_axes = len(component.parts(entry_name)[0].shape)
                unit_name = unit_of(kind, entry_name, num_axes)
                units.setdefault(unit_name, Contents()).add(owner, leaf, component, entry_name)
    return units


def weigh(inventory: Inventory, contents: Mapping[str, Contents]) -> Inventory:
    """The inventory with each unit's bytes as its buffer has them, alignment included."""

    def weighed(*units: Unit) -> tuple[Unit, ...]:
        return tuple(replace(unit, num_bytes=contents[unit.name].num_bytes) for unit in units)

    return replace(
        inventory,
        t5=weighed(*inventory.t5),
        clip=weighed(inventory.clip)[0],
        conditioner=weighed(*inventory.conditioner),
        blocks=weighed(*inventory.blocks),
        vae=weighed(inventory.vae)[0],
        fixed_bytes=contents[FIXED].num_bytes,
        t5_table_bytes=contents[T5_TOKENS].num_bytes,
    )
