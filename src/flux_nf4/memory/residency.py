"""Carries out a plan: every unit is on the device when it computes, and no sooner than planned.

Modules ask for their unit as they are called. A unit that is kept has a buffer of its own, and is
loaded in the background from the moment the plan is known; one that stays for the loop gets one
when the first step comes near it. The others take turns in the slots of their phase's ring: as
soon as the next unit is asked for, the slot of the one before is refilled, after its arithmetic.

A thread of its own moves units, those of the running phase before those in the background. It
takes a unit from pinned memory in one copy; from anywhere else through one of two staging buffers.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import PriorityQueue
from typing import TYPE_CHECKING

import torch

from flux_nf4.memory.inventory import FIXED, T5_TOKENS
from flux_nf4.nf4 import scratch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flux_nf4.memory.contents import Contents
    from flux_nf4.memory.device import Device, Mark
    from flux_nf4.memory.placement import Phase, Placement, Plan

NUM_READERS = 16  # threads that read from a file at once
NUM_STAGING = 2  # one is read into while the other is copied from
LOOKAHEAD = 6  # units of the loop that are asked for before they are needed
OWN = -1  # in place of a slot: a buffer of its own
_RUNNING, _BACKGROUND = 0, 1
_PATIENCE_S = 10.0  # for a move at the end of the process: its file may be on a disk that has gone


@dataclass(order=True, slots=True)
class Move:
    """One unit on its way; those of the running phase first, each in the order of asking."""

    rank: int
    number: int
    unit: str = field(compare=False)
    target: Tensor | None = field(compare=False)
    after: Mark = field(compare=False)
    moved: Future[Mark] = field(compare=False, default_factory=Future)

    @property
    def has_failed(self) -> bool:
        """Whether the buffer holds nothing and will not, as is known by now."""
        return self.moved.done() and self.moved.exception() is not None

    def call_off(self) -> bool:
        """Forget the buffer -> whether that was in time. A queue may hold the move for long."""
        if not self.moved.cancel():
            return False
        self.target = None
        return True


class Mover:
    """Brings units into buffers of the device, one after the other, in a thread of its own."""

    def __init__(self, device: Device, contents: Mapping[str, Contents]) -> None:
        self._device, self._contents = device, contents
        self._homes: dict[str, str] = {}
        self._host: dict[str, Tensor] = {}
        self._staging: deque[tuple[Tensor, Mark]] = deque()
        self._readers = ThreadPoolExecutor(min(NUM_READERS, os.cpu_count() or 1))
        self._moves: PriorityQueue[Move] = PriorityQueue()
        self._numbers = itertools.count()
        self.moved_bytes = 0
        thread = threading.Thread(target=_work, args=(weakref.ref(self), self._moves), daemon=True)
        thread.start()
        weakref.finalize(self, _end, thread, self._moves, self._readers)

    def settle(self, homes: Mapping[str, str]) -> None:
        """Learn where units live, and let go of what lives in host memory no more."""
        self._homes = dict(homes)
        leaving = [name for name in self._host if homes[name] not in ("pinned", "pageable")]
        if leaving:
            self._device.reach(self._device.mark())  # no copy reads from it any more
        for name in leaving:
            del self._host[name]

    def move(self, unit: str, target: Tensor, *, background: bool = False) -> Move:
        """Fill a buffer with a unit, once the arithmetic asked for so far is done with it."""
        rank = _BACKGROUND if background else _RUNNING
        move = Move(rank, next(self._numbers), unit, target, self._device.mark())
        self._moves.put(move)
        return move

    def do(self, move: Move) -> None:
        """Carry out one move; what goes wrong is told to whoever waits for it.

        Whoever waits finds that nothing here refers to the buffer any more: it may free it next.
        """
        if not move.moved.set_running_or_notify_cancel():
            return
        try:
            with torch.inference_mode(mode=False):
                mark = self._moved(move)
        except BaseException as error:  # noqa: BLE001  whoever waits raises it, or waits for ever
            traceback.clear_frames(error.__traceback__)
            move.target = None
            move.moved.set_exception(error)
        else:
            move.target = None
            move.moved.set_result(mark)

    def _moved(self, move: Move) -> Mark:
        assert move.target is not None
        contents, home = self._contents[move.unit], self._homes.get(move.unit, "device")
        num_bytes = contents.num_bytes
        host = self._host.get(move.unit)
        if host is None and home in ("pinned", "pageable"):
            if home == "pinned":
                host = self._device.pin(num_bytes)
            else:
                host = torch.empty(num_bytes, dtype=torch.uint8)
            contents.fill(host, self._readers)
            self._host[move.unit] = host
        self.moved_bytes += num_bytes
        target = move.target[:num_bytes]
        if host is not None and home == "pinned":
            return self._device.copy(target, host, after=move.after)
        staging = self._next_staging()
        if host is None:
            contents.fill(staging, self._readers)
        else:
            staging[:num_bytes].copy_(host)
        mark = self._device.copy(target, staging[:num_bytes], after=move.after)
        self._staging.append((staging, mark))
        return mark

    def _next_staging(self) -> Tensor:
        if len(self._staging) < NUM_STAGING:
            return self._device.pin(max(each.num_bytes for each in self._contents.values()))
        staging, mark = self._staging.popleft()
        self._device.reach(mark)
        return staging


def _work(mover_ref: weakref.ref[Mover], moves: PriorityQueue[Move]) -> None:
    # Between moves the thread holds no reference, so that a model that is dropped is gone.
    while (move := moves.get()).unit:
        mover = mover_ref()
        if mover is None:
            return
        mover.do(move)
        del mover, move


def _end(thread: threading.Thread, moves: PriorityQueue[Move], readers: Executor) -> None:
    """End a mover's thread, also where Python ends: inside PyTorch it would abort the process."""
    moves.put(Move(_RUNNING, -1, "", None, None))
    readers.shutdown(wait=False)
    if thread is not threading.current_thread():
        thread.join(_PATIENCE_S)


@dataclass(slots=True, kw_only=True, eq=False)
class _Running:
    """A phase under way: its ring, what is to come, and what is on its way in order of use."""

    ring: list[Tensor]
    free: set[int]
    upcoming: deque[tuple[str, int]]
    ahead: deque[tuple[str, int, Move]] = field(default_factory=deque)
    views: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    loop: dict[str, Tensor] = field(default_factory=dict)
    slot: int | None = None
    unit: str = ""


class Residency:
    """The units of one model on one device.

    Raises:
        torch.OutOfMemoryError: not even what is on the device at all times has room.
    """

    def __init__(self, device: Device, contents: Mapping[str, Contents]) -> None:
        self.device, self._contents = device, contents
        self._mover = Mover(device, contents)
        self._placements: dict[str, Placement] = {}
        self._kept: dict[str, Tensor] = {}
        self._pending: dict[str, Move] = {}
        self._running: _Running | None = None
        self._units: dict[nn.Module, str] = {}
        self.plan: Plan | None = None
        for each in contents.values():
            each.take_away()
        for place in contents[T5_TOKENS].places:
            table = place.value(place.component.entries[place.entry_name])
            place.put(table.to(place.outline.dtype))
        self._hold(FIXED, background=False)

    @property
    def moved_bytes(self) -> int:
        """Bytes that came to the device so far."""
        return self._mover.moved_bytes

    def watch(self, unit: str, module: nn.Module) -> None:
        """Ask for a unit whenever a module is called."""
        self._units[module] = unit
        # Its modules do not keep it: else a model that is dropped would stay until Python looks.
        residency_ref = weakref.ref(self)

        def ask(*_: object) -> None:
            residency = residency_ref()
            if residency is not None:
                residency.need(unit)

        module.register_forward_pre_hook(ask)

    def is_streamed(self, module: nn.Module) -> bool:
        """Whether a module that is watched finds its weights anew in every pass."""
        return self._placements[self._units[module]].use == "streamed"

    def adopt(self, plan: Plan) -> None:
        """Follow another plan from now on; what it keeps begins to load, or to load once more.

        Raises:
            torch.OutOfMemoryError: there is no room for what is kept.
        """
        failed = [unit for unit, move in self._pending.items() if move.has_failed]
        for unit in failed:
            self._drop(unit)
        if plan is self.plan and not failed:
            return
        self.plan = plan
        self._placements = {each.unit.name: each for each in plan.placements}
        used = self._placements.items()
        kept = [FIXED, *(name for name, each in used if each.use == "kept")]
        for name in self._kept.keys() - set(kept):
            self._drop(name)
        self._mover.settle({name: each.home for name, each in self._placements.items()})
        for name in kept:
            if name not in self._kept:
                self._hold(name, background=True)

    def forget(self) -> None:
        """Let go of everything that could be loaded again."""
        for name in self._kept.keys() - {FIXED}:
            self._drop(name)
        self.plan = None
        scratch.release()
        self.device.release()

    @contextlib.contextmanager
    def phase(self, name: Phase, *, num_passes: int = 1) -> Iterator[None]:
        """Run a phase, which uses each of its units once a pass, in order.

        Raises:
            torch.OutOfMemoryError: there is no room for the ring, or for what comes into it.
        """
        assert self.plan is not None
        (planned,) = (each for each in self.plan.phases if each.name == name)
        units = [u for u in self._placements if u.partition(".")[0] in _UNITS[name]]
        uses = {unit: self._placements[unit].use for unit in units}
        streamed = [unit for unit in units if uses[unit] == "streamed"]
        moving = [unit for unit in units if uses[unit] in ("streamed", "loop")]
        ring = planned.ring
        slots = dict(zip(streamed, slots_in_turn(len(streamed), ring.num_slots), strict=True))
        moves = [(unit, slots.get(unit, OWN)) for unit in [*moving, *(num_passes - 1) * streamed]]
        running = _Running(ring=[], free=set(range(ring.num_slots)), upcoming=deque(moves))
        self.need(FIXED)
        try:
            running.ring += (self.device.allocate(ring.slot_bytes) for _ in range(ring.num_slots))
            self._running = running
            self._advance(running)
            if name == "decode":
                self.need("vae")  # it has more than one way in
            yield
        finally:
            self._running = None
            self._finish(running)

    def need(self, unit: str) -> None:
        """Let the arithmetic that follows find a unit on the device.

        Raises:
            FormatError: its file cannot be read or is damaged.
        """
        running = self._running
        if running is not None and running.unit != unit:
            self._retire(running)
            running.unit = unit
            self._advance(running)
            if unit not in self._kept:
                self._take(running, unit)
            self._advance(running)
        move = self._pending.get(unit)
        if move is not None:
            self.device.wait(move.moved.result())
            del self._pending[unit]

    def _take(self, running: _Running, unit: str) -> None:
        if unit in running.loop and (not running.ahead or running.ahead[0][0] != unit):
            return  # it has been there since the first step
        expected, slot, move = running.ahead[0]
        assert expected == unit, f"{unit} was asked for before {expected}"
        self.device.wait(move.moved.result())
        running.ahead.popleft()
        contents = self._contents[unit]
        views = running.views.get((unit, slot))
        if views is None:
            buffer = running.loop[unit] if slot == OWN else running.ring[slot]
            views = running.views[unit, slot] = contents.views(buffer)
        contents.put(views)
        running.slot = None if slot == OWN else slot

    def _retire(self, running: _Running) -> None:
        """The unit before is done, as far as the device was told: its slot takes another."""
        if running.slot is not None:
            running.free.add(running.slot)
            running.slot = None

    def _advance(self, running: _Running) -> None:
        """Send for what comes next: into slots that are free, and a few units for the loop."""
        while running.upcoming and len(running.ahead) < LOOKAHEAD:
            unit, slot = running.upcoming[0]
            if slot == OWN:
                target = running.loop[unit] = self.device.allocate(self._contents[unit].num_bytes)
            elif slot in running.free:
                running.free.remove(slot)
                target = running.ring[slot]
            else:
                return
            running.upcoming.popleft()
            running.ahead.append((unit, slot, self._mover.move(unit, target)))

    def _finish(self, running: _Running) -> None:
        """Nothing of a phase is on its way any more, and no module refers to its buffers."""
        for _, _, move in running.ahead:
            self._await(move)
        for unit in {unit for unit, _ in running.views}:
            self._contents[unit].take_away()
        scratch.release()

    def _hold(self, unit: str, *, background: bool) -> None:
        contents = self._contents[unit]
        buffer = self._kept[unit] = self.device.allocate(contents.num_bytes)
        contents.put(contents.views(buffer))
        self._pending[unit] = self._mover.move(unit, buffer, background=background)

    def _drop(self, unit: str) -> None:
        move = self._pending.pop(unit, None)
        if move is not None:
            self._await(move)
        self._contents[unit].take_away()
        del self._kept[unit]

    def _await(self, move: Move) -> None:
        """Let no memory go that a copy still writes to."""
        if not move.call_off() and move.moved.exception() is None:
            self.device.wait(move.moved.result())


def slots_in_turn(num_units: int, num_slots: int) -> list[int]:
    """A slot for each unit, the same in every pass: what was captured finds its weights there.

    Rounds over all slots, and as many without the last one as let the pass end with a round: of
    two passes, too, no unit waits for the slot of one just before it.
    """
    num_short = -num_units % num_slots if num_slots else 0
    num_full = (num_units - num_short * (num_slots - 1)) // max(1, num_slots)
    if num_full < 0:
        return [i % num_slots for i in range(num_units)]
    return [*range(num_slots)] * num_full + [*range(num_slots - 1)] * num_short


_UNITS: dict[Phase, tuple[str, ...]] = {
    "text": ("t5", "clip"),
    "modulation": ("conditioner",),
    "denoise": ("blocks",),
    "decode": ("vae",),
}
