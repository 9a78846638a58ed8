"""What a plan says: where every unit lives, how it is used, and what each phase takes.

An executor carries this out without a decision of its own: all of them are here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from flux_nf4.memory.activations import Workload
from flux_nf4.memory.budget import Budget, Home
from flux_nf4.memory.inventory import Unit

Use: TypeAlias = Literal["kept", "loop", "streamed", "looked up"]
Phase: TypeAlias = Literal["text", "modulation", "denoise", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a unit lives, and how its phase has it.

    `kept`: on the device from image to image. `loop`: loaded as the first step passes it, and held
    until the loop ends. `streamed`: through its phase's ring, at each use. `looked up`: never on
    the device; rows of it are.
    """

    unit: Unit
    home: Home
    use: Use


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """The slots that streamed units of a phase take turns in."""

    num_slots: int
    slot_bytes: int

    @property
    def num_bytes(self) -> int:
        """All slots together."""
        return self.num_slots * self.slot_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePlan:
    """One phase: what it holds at its worst moment, what it moves, how long it takes.

    `resident_bytes` are weights, `working_bytes` activations; `peak_bytes` has everything, context
    and slack included. `moved_bytes` and `predicted_ns` are those of the whole phase, for all
    images, with kept units on the device already.
    """

    name: Phase
    resident_bytes: int
    ring: Ring
    working_bytes: int
    peak_bytes: int
    moved_bytes: int
    predicted_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Who is where and when; `placements` are in order of use."""

    budget: Budget
    workload: Workload
    placements: tuple[Placement, ...]
    phases: tuple[PhasePlan, ...]
    batch_size: int
    step_bytes: int
    step_ns: int
    compute_ns: int

    @property
    def peak_bytes(self) -> int:
        """The worst moment of all, context included."""
        return max(phase.peak_bytes for phase in self.phases)

    @property
    def total_ns(self) -> int:
        """All images, prompt to pixels, with kept units on the device already."""
        return sum(phase.predicted_ns for phase in self.phases)

    def bytes_in(self, *homes: Home) -> int:
        """The units that live there, together."""
        return sum(each.unit.num_bytes for each in self.placements if each.home in homes)
