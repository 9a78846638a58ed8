"""Walks through a plan as an executor would, counting bytes: what is wrong with it, in words.

Written from what the words of a plan mean (`memory.placement`), and from nothing of the planner.
The activations of a phase are taken as given: other tests hold them to the real modules.
"""

from collections import Counter

from flux_nf4.memory import activations
from flux_nf4.memory.budget import SLACK_BYTES


class Device:
    """Memory that knows who holds what; `peak` is the worst moment since `reset`."""

    def __init__(self, limit):
        self.limit, self.held, self.peak, self.wrong = limit, Counter(), 0, []

    def take(self, what, num_bytes):
        if what in self.held:
            self.wrong.append(f"{what} is taken twice")
        self.held[what] = num_bytes
        total = self.held.total()
        self.peak = max(self.peak, total)
        if total > self.limit:
            self.wrong.append(f"{what}: {total} bytes of {self.limit}")

    def drop(self, what):
        del self.held[what]

    def reset(self):
        self.peak = self.held.total()


class Walk:
    """One image after another, with what is kept on the device already."""

    def __init__(self, inventory, plan):
        self.inventory, self.plan, self.workload = inventory, plan, plan.workload
        self.placements = {each.unit.name: each for each in plan.placements}
        self.phases = {phase.name: phase for phase in plan.phases}
        self.device = Device(plan.budget.device_bytes)
        self.device.take("context", plan.budget.context_bytes)
        self.device.take("slack", SLACK_BYTES)
        self.device.take("fixed", inventory.fixed_bytes)
        self.device.take("row scales", inventory.row_scale_bytes)
        for placement in plan.placements:
            if placement.use == "kept":
                self.device.take(placement.unit.name, placement.unit.num_bytes)
        self.moved, self.peaks = Counter(), {}

    def go(self):
        inventory, workload = self.inventory, self.workload
        self.begin("text")
        units = (*inventory.t5, inventory.clip)
        self.once("text", units, activations.text_bytes(inventory, workload))
        self.end("text")
        self.begin("modulation")
        working = activations.modulation_bytes(inventory, workload)
        for _ in range(workload.num_passes):
            self.once("modulation", inventory.conditioner, working)
        self.end("modulation")
        left = workload.num_images
        while left > 0:
            batch_size = min(left, self.plan.batch_size)
            left -= batch_size
            self.begin("denoise")
            self.denoise(batch_size)
            self.end("denoise")
            self.begin("decode")
            working = activations.decode_bytes(inventory.sizes, workload, batch_size)
            self.once("decode", (inventory.vae,), working)
            self.end("decode")
        return self

    def begin(self, phase):
        self.device.reset()

    def end(self, phase):
        self.peaks[phase] = max(self.device.peak, self.peaks.get(phase, 0))

    def once(self, phase, units, working):
        """Units that are each used once, in order."""
        ring = self.phases[phase].ring
        self.device.take("working", working)
        self.device.take("ring", ring.num_bytes)
        for unit in units:
            self.need(unit, self.placements[unit.name].use, ring, phase)
        self.device.drop("working")
        self.device.drop("ring")

    def denoise(self, batch_size):
        ring, workload = self.phases["denoise"].ring, self.workload
        working = activations.denoise_bytes(self.inventory, workload, batch_size)
        self.device.take("working", working)
        self.device.take("ring", ring.num_bytes)
        brought = []
        for _ in range(workload.num_steps * workload.num_passes):
            for block in self.inventory.blocks:
                use = self.placements[block.name].use
                if use == "loop" and block.name not in self.device.held:
                    self.device.take(block.name, block.num_bytes)
                    self.moved["denoise"] += block.num_bytes
                    brought.append(block.name)
                self.need(block, use, ring, "denoise")
        for name in (*brought, "working", "ring"):
            self.device.drop(name)

    def need(self, unit, use, ring, phase):
        """The unit is about to compute: it must be there, or pass through a slot."""
        if use == "streamed":
            self.moved[phase] += unit.num_bytes
            if ring.slot_bytes < unit.num_bytes or ring.num_slots < 1:
                self.device.wrong.append(f"{unit.name} does not fit a slot")
        elif unit.name not in self.device.held:
            self.device.wrong.append(f"{unit.name} is not there when it computes")


def faults(inventory, plan):
    """Everything wrong with a plan; an empty list is a good plan."""
    walk = Walk(inventory, plan).go()
    wrong = list(walk.device.wrong)
    units = (*inventory.t5, inventory.clip, *inventory.conditioner, *inventory.blocks)
    names = Counter(each.unit.name for each in plan.placements)
    expected = Counter([unit.name for unit in (*units, inventory.vae)] + ["t5.tokens"])
    if names != expected:
        wrong.append(f"placements are of {names}, not of {expected}")
    for phase in plan.phases:
        if phase.moved_bytes != walk.moved[phase.name]:
            wrong.append(f"{phase.name} moves {walk.moved[phase.name]}, not {phase.moved_bytes}")
        if phase.peak_bytes != walk.peaks[phase.name]:
            wrong.append(f"{phase.name} peaks at {walk.peaks[phase.name]}, not {phase.peak_bytes}")
    return wrong + _host_faults(plan)


def _host_faults(plan):
    budget = plan.budget
    wrong = [
        f"{each.unit.name} lives in {each.home} and is {each.use}"
        for each in plan.placements
        if (each.home == "device") != (each.use == "kept")
    ]
    limits = (
        (("pinned",), budget.pinned_bytes),
        (("pinned", "pageable"), budget.host_bytes),
    )
    for homes, limit in limits:
        held = sum(each.unit.num_bytes for each in plan.placements if each.home in homes)
        if limit is not None and held > limit:
            wrong.append(f"{held} bytes are {homes}, of {limit}")
    return wrong
