"""The memory planner: from an inventory and a budget to who is where and when; or why not.

An image has four phases (text, modulation, denoise, decode), and none needs another's weights. The
blocks run every step, so they come first: as many as fit stay on the device during the loop, the
others pass through a ring of slots, each arriving while those before it compute. What runs once
an image passes through a ring of two. What still fits everywhere is kept for the next image.

Every choice is either the most of a nested list (blocks on the device, units kept) that fits, or
the fastest of a few that do not depend on the budget (batches): so more memory is never
slower, and the same input always gives the same plan. Bytes and nanoseconds are whole numbers.
No torch here, not even indirectly: a plan is made before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from flux_nf4.errors import DoesNotFitError
from flux_nf4.memory import activations
from flux_nf4.memory.activations import Workload
from flux_nf4.memory.budget import CONTEXT_BYTES, MIB, SLACK_BYTES, Budget, Home, Machine
from flux_nf4.memory.inventory import T5_TOKENS, Inventory, Unit
from flux_nf4.memory.placement import Phase, PhasePlan, Placement, Plan, Ring, Use

RING_SLOTS = 3  # one computes, one is ready, one arrives
FEWEST_SLOTS = 2
SMALLEST_SIZE = 64  # pixels, of a side
# Multiples of the golden ratio's fraction spread a list's every beginning, and every rest, evenly.
_GOLDEN = 40503  # / 65536


def make_plan(
    inventory: Inventory, workload: Workload, budget: Budget, machine: Machine | None = None
) -> Plan:
    """The fastest plan that fits.

    Raises:
        DoesNotFitError: there is none; it names the smallest budget, and the largest size that
            would fit this one.
    """
    machine = machine or Machine()
    plans = [
        plan
        for batch_size in _batch_sizes(workload.num_images)
        if (plan := _Case(inventory, workload, machine, batch_size).solve(budget))
    ]
    if plans:
        return min(plans, key=lambda plan: plan.total_ns)  # of equals the first: fewest splits
    raise _does_not_fit(inventory, workload, budget)


def smallest_budget(
    inventory: Inventory, workload: Workload, *, context_bytes: int = CONTEXT_BYTES
) -> int:
    """The fewest device bytes, context included, that any plan for `workload` fits."""
    return context_bytes + _Case(inventory, workload, Machine(), 1).fewest_bytes()


def largest_size(inventory: Inventory, workload: Workload, budget: Budget) -> Workload | None:
    """The largest image of the same shape that fits, no larger than asked; None where none does."""
    step = activations.PIXELS_PER_TOKEN
    for width in range(workload.width, SMALLEST_SIZE - 1, -step):
        height = workload.height * width // workload.width // step * step
        if height < SMALLEST_SIZE:
            return None
        smaller = replace(workload, width=width, height=height)
        fewest = smallest_budget(inventory, smaller, context_bytes=budget.context_bytes)
        if fewest <= budget.device_bytes:
            return smaller
    return None


def _does_not_fit(inventory: Inventory, workload: Workload, budget: Budget) -> DoesNotFitError:
    needed = smallest_budget(inventory, workload, context_bytes=budget.context_bytes)
    size = largest_size(inventory, workload, budget)
    fits = f", or draw {size.width} x {size.height}, the largest that fits" if size else ""
    mib, allowed_mib = -(-needed // MIB), budget.device_bytes // MIB
    return DoesNotFitError(
        f"{inventory.name} at {workload.width} x {workload.height} needs {mib:,} MiB of device "
        f"memory, and the budget is {allowed_mib:,} MiB",
        hint=f"allow {mib}MiB{fits}",
    )


def keep_order(blocks: Sequence[Unit]) -> tuple[int, ...]:
    """Which block stays on the device first; the others lie evenly between, however many stay.

    The largest first: each computes for as long as any other, so a step waits for these.
    """
    sizes: dict[int, list[int]] = {}
    for index, block in enumerate(blocks):
        sizes.setdefault(block.num_bytes, []).append(index)

    def turn(place: int) -> int:
        return place * _GOLDEN % 65536

    return tuple(
        sizes[size][place]
        for size in sorted(sizes, reverse=True)
        for place in sorted(range(len(sizes[size])), key=turn)
    )


def _batch_sizes(num_images: int) -> tuple[int, ...]:
    """All at once, then in two, three, ... batches of about the same size, each size once."""
    return tuple(dict.fromkeys(-(-num_images // parts) for parts in range(1, num_images + 1)))


def _sum(units: Iterable[Unit]) -> int:
    return sum(unit.num_bytes for unit in units)


def _ring(units: tuple[Unit, ...], num_slots: int) -> Ring:
    largest = max((unit.num_bytes for unit in units), default=0)
    return Ring(num_slots=min(num_slots, len(units)), slot_bytes=largest)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Need:
    """What one phase takes beside context, slack and what is always there."""

    resident: int
    ring: Ring
    working: int

    @property
    def num_bytes(self) -> int:
        return self.resident + self.ring.num_bytes + self.working


class _Case:
    """One batch size: what its phases need, and the most that a budget keeps."""

    def __init__(
        self,
        inventory: Inventory,
        workload: Workload,
        machine: Machine,
        batch_size: int,
    ) -> None:
        self.inventory, self.workload, self.machine = inventory, workload, machine
        self.batch_size = batch_size
        order = keep_order(inventory.blocks)
        self.blocks = tuple(inventory.blocks[index] for index in order)
        # What is kept between images comes in this order, T5 layer by layer from the first: it
        # computes while the others arrive.
        self.keeping = (
            *self.blocks,
            inventory.vae,
            *inventory.conditioner,
            inventory.clip,
            *inventory.t5,
        )
        self.ranks = {unit.name: i for i, unit in enumerate(self.keeping)}
        self.text_working = activations.text_bytes(inventory, workload)
        self.modulation_working = activations.modulation_bytes(inventory, workload)
        self.denoise_working = activations.denoise_bytes(inventory, workload, batch_size)
        self.decode_working = activations.decode_bytes(inventory.sizes, workload, batch_size)

    def fewest_bytes(self) -> int:
        """The least that fits, on the allocator: nothing kept, and the least loop."""
        fewest = min(self._loop(*state).num_bytes for state in self._states())
        needs = (self._text(0), self._modulation(0), self._decode(0))
        return self._always + max(fewest, *(need.num_bytes for need in needs))

    def solve(self, budget: Budget) -> Plan | None:
        """The plan within a budget; None where not even the least fits."""
        room = budget.device_bytes - budget.context_bytes - self._always
        fitting = [state for state in self._states() if self._loop(*state).num_bytes <= room]
        if not fitting:
            return None
        num_slots, num_resident = fitting[-1]
        num_kept = -1
        for count in range(self._most_kept(num_resident) + 1):
            needs = self._needs(count, num_slots, num_resident)
            if any(need.num_bytes > room for need in needs.values()):
                break
            num_kept = count
        if num_kept < 0:
            return None
        return self._plan(budget, num_kept, num_slots, num_resident)

    @property
    def _always(self) -> int:
        return self.inventory.fixed_bytes + self.inventory.row_scale_bytes + SLACK_BYTES

    def _states(self) -> Iterator[tuple[int, int]]:
        """The loop's choices, the most on the device last: (slots, blocks on the device)."""
        yield FEWEST_SLOTS, 0
        for num_resident in range(len(self.blocks) + 1):
            yield RING_SLOTS, num_resident

    def _most_kept(self, num_resident: int) -> int:
        """How many units may be kept: only blocks that the loop has, and all of those first."""
        return len(self.keeping) if num_resident == len(self.blocks) else num_resident

    def _kept(self, count: int) -> tuple[Unit, ...]:
        return self.keeping[:count]

    def _needs(self, count: int, num_slots: int, num_resident: int) -> dict[Phase, _Need]:
        return {
            "text": self._text(count),
            "modulation": self._modulation(count),
            "denoise": self._loop(num_slots, num_resident, count),
            "decode": self._decode(count),
        }

    def _once(self, count: int, units: tuple[Unit, ...], working: int) -> _Need:
        """A phase that sees each of its units once: kept on the device, or through a ring."""
        passing = tuple(unit for unit in units if self.ranks[unit.name] >= count)
        ring = _ring(passing, FEWEST_SLOTS)
        return _Need(resident=_sum(self._kept(count)), ring=ring, working=working)

    def _text(self, count: int) -> _Need:
        return self._once(count, (*self.inventory.t5, self.inventory.clip), self.text_working)

    def _modulation(self, count: int) -> _Need:
        return self._once(count, self.inventory.conditioner, self.modulation_working)

    def _decode(self, count: int) -> _Need:
        return self._once(count, (self.inventory.vae,), self.decode_working)

    def _loop(self, num_slots: int, num_resident: int, count: int = 0) -> _Need:
        others = self._kept(count)[len(self.blocks) :]
        return _Need(
            resident=_sum(self.blocks[:num_resident]) + _sum(others),
            ring=_ring(self.blocks[num_resident:], num_slots),
            working=self.denoise_working,
        )

    def _plan(self, budget: Budget, num_kept: int, num_slots: int, num_resident: int) -> Plan:
        homes = self._homes(budget, num_kept)
        compute_ns, step_ns, took = self._times(homes, num_resident)
        streamed = self.blocks[num_resident:]
        moved = self._moved(homes, _sum(streamed))
        needs = self._needs(num_kept, num_slots, num_resident)
        return Plan(
            budget=budget,
            workload=self.workload,
            placements=tuple(self._placements(homes, num_resident)),
            phases=tuple(
                PhasePlan(
                    name=name,
                    resident_bytes=need.resident + self.inventory.fixed_bytes,
                    ring=need.ring,
                    working_bytes=need.working,
                    peak_bytes=budget.context_bytes + self._always + need.num_bytes,
                    moved_bytes=moved[name],
                    predicted_ns=took[name],
                )
                for name, need in needs.items()
            ),
            batch_size=self.batch_size,
            step_bytes=self.workload.num_passes * _sum(streamed),
            step_ns=step_ns,
            compute_ns=compute_ns,
        )

    @property
    def _num_batches(self) -> int:
        return -(-self.workload.num_images // self.batch_size)

    def _moved(self, homes: dict[str, Home], streamed_bytes: int) -> dict[Phase, int]:
        inventory, workload = self.inventory, self.workload

        def loaded(*units: Unit) -> int:
            return _sum(unit for unit in units if homes[unit.name] != "device")

        # The first pass brings the blocks that stay, too.
        num_more_passes = workload.num_passes * workload.num_steps - 1
        loop_bytes = loaded(*self.blocks) + num_more_passes * streamed_bytes
        return {
            "text": loaded(*inventory.t5, inventory.clip),
            "modulation": workload.num_passes * loaded(*inventory.conditioner),
            "denoise": self._num_batches * loop_bytes,
            "decode": self._num_batches * loaded(inventory.vae),
        }

    def _times(
        self, homes: dict[str, Home], num_resident: int
    ) -> tuple[int, int, dict[Phase, int]]:
        """Nanoseconds of arithmetic and in all of a step, and of each phase for all images."""
        machine, workload, inventory = self.machine, self.workload, self.inventory

        def transfer_ns(*units: Unit) -> int:
            return sum(machine.transfer_ns(unit.num_bytes, homes[unit.name]) for unit in units)

        def once_ns(units: tuple[Unit, ...], num_rows: int) -> int:
            num_products = num_rows * sum(unit.weights_per_token for unit in units)
            flops = 2 * workload.num_passes * num_products
            return max(transfer_ns(*units), machine.compute_ns(flops))

        compute_ns = (
            machine.compute_ns(activations.step_flops(inventory, workload, self.batch_size))
            if machine.step_ns is None
            else machine.step_ns * self.batch_size
        )
        pass_ns = transfer_ns(*self.blocks[num_resident:])
        step_ns = max(compute_ns, workload.num_passes * pass_ns)
        first_ns = max(compute_ns, transfer_ns(*self.blocks) + (workload.num_passes - 1) * pass_ns)
        pixels = workload.width * workload.height
        decode_ns = machine.compute_ns(activations.decode_flops(inventory.sizes, pixels))
        took: dict[Phase, int] = {
            "text": once_ns((*inventory.t5, inventory.clip), workload.num_text_tokens),
            "modulation": once_ns(inventory.conditioner, workload.num_steps),
            "denoise": self._num_batches * (first_ns + (workload.num_steps - 1) * step_ns),
            "decode": self._num_batches * transfer_ns(inventory.vae)
            + workload.num_images * decode_ns,
        }
        return compute_ns, step_ns, took

    def _homes(self, budget: Budget, num_kept: int) -> dict[str, Home]:
        """Host memory goes to what moves most often; what it cannot hold stays in the file.

        Streamed blocks are the last in the order of keeping, so they are the first here.
        """
        queue = (*reversed(self.blocks), *self.keeping[len(self.blocks) :], self._tokens)
        kept = {unit.name for unit in self._kept(num_kept)}
        homes: dict[str, Home] = dict.fromkeys(kept, "device")
        limits: tuple[tuple[Home, int | None], ...] = (
            ("pinned", _least(budget.host_bytes, budget.pinned_bytes)),
            ("pageable", budget.host_bytes),
            ("file", None),
        )
        used, place = 0, 0
        for unit in queue:
            if unit.name in kept:
                continue
            used += unit.num_bytes
            while (limit := limits[place][1]) is not None and used > limit:
                place += 1
            homes[unit.name] = limits[place][0]
        return homes

    @property
    def _tokens(self) -> Unit:
        return Unit(name=T5_TOKENS, num_bytes=self.inventory.t5_table_bytes)

    def _placements(self, homes: dict[str, Home], num_resident: int) -> Iterator[Placement]:
        inventory = self.inventory
        uses: dict[str, Use] = {block.name: "loop" for block in self.blocks[:num_resident]}
        uses[self._tokens.name] = "looked up"
        uses |= {name: "kept" for name, home in homes.items() if home == "device"}
        units = (self._tokens, *inventory.t5, inventory.clip)
        for unit in (*units, *inventory.conditioner, *inventory.blocks, inventory.vae):
            use = uses.get(unit.name, "streamed")
            yield Placement(unit=unit, home=homes[unit.name], use=use)


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
