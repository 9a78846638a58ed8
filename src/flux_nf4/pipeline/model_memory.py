"""A model's memory: a plan for each request, carried out; and what is done when it runs out.

On a CPU everything is in main memory as it is, and nothing here has anything to do but to remember
what text encoders made of the last prompts.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from flux_nf4.errors import DoesNotFitError, InputError
from flux_nf4.memory.budget import CONTEXT_BYTES, DESKTOP_BYTES, SLACK_BYTES, Budget
from flux_nf4.memory.checkpoint_inventory import component_entries
from flux_nf4.memory.contents import take_contents, weigh
from flux_nf4.memory.device import CudaDevice, Device
from flux_nf4.memory.host import measure_host
from flux_nf4.memory.inventory import take_inventory
from flux_nf4.memory.plan import largest_size, make_plan, smallest_budget
from flux_nf4.memory.residency import Residency
from flux_nf4.model import fused
from flux_nf4.model.step_graph import LEAST_CALLS, StepGraph
from flux_nf4.pipeline.events import Notice

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from flux_nf4.formats.component import Component, ComponentKind
    from flux_nf4.memory.activations import Workload
    from flux_nf4.memory.inventory import Inventory
    from flux_nf4.memory.placement import Phase, Plan
    from flux_nf4.model.blocks import FluxBlocks
    from flux_nf4.nf4.eight_bit import Arithmetic
    from flux_nf4.pipeline.conditioning import Text

    Parts = Mapping[ComponentKind, tuple[nn.Module, Component]]

MAX_TEXTS = 32  # prompts whose embeddings are remembered, of 4 MB a text for FLUX.1-dev
PEAK_TOLERANCE = 0.1
# What CUDA, Triton, cuBLAS and cuDNN say, whose allocations are not PyTorch's.
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")
_SHRINK = 3 / 4  # of what a plan has above the least that the next smaller one may have

Result = TypeVar("Result")


def managed_device(device: torch.device, vram: int | None) -> Device | None:
    """Who manages memory on a device; None where everything stays where it is loaded."""
    if device.type == "cuda":
        return CudaDevice(device)
    return None if device.type == "cpu" or vram is None else Device(device)


class TextCache:
    """What the encoders made of the last prompts, in main memory, the oldest forgotten first."""

    def __init__(self) -> None:
        self._texts: OrderedDict[tuple[object, ...], list[Text]] = OrderedDict()

    def get(self, key: tuple[object, ...], encode: Callable[[], list[Text]]) -> list[Text]:
        """The texts under `key`, encoded if they are not known."""
        texts = self._texts.pop(key, None)
        if texts is None:
            texts = encode()
        self._texts[key] = texts
        if len(self._texts) > MAX_TEXTS:
            self._texts.popitem(last=False)
        return texts


class ModelMemory:
    """Where a model's networks are; without a residency all of them are where they compute."""

    def __init__(
        self,
        residency: Residency | None = None,
        inventory: Inventory | None = None,
        *,
        free_bytes: int | None = None,
        ram: int | None = None,
    ) -> None:
        self.texts = TextCache()
        self.residency = residency
        self.inventory, self._free_bytes, self._ram = inventory, free_bytes, ram
        self._host = measure_host()
        self._budget: Budget | None = None  # what was set, less what was learnt since
        self._set_budget: Budget | None = None
        self._phases: set[Phase] = set()
        self._was_least = False
        self.num_shrinks = 0
        self._graph: StepGraph | None = None
        self._has_graphs = True
        self._in_use = threading.Lock()
        self.plan: Plan | None = None

    def plan_within(self, vram: int | None, workload: Workload) -> Plan:
        """The plan that `set_budget` would lead to; nothing changes, and any thread may ask.

        Raises:
            DoesNotFitError: there is none.
            InputError: `vram` is None, and the device does not tell what is free.
        """
        assert self.inventory is not None
        return make_plan(self.inventory, workload, self._budget_of(vram))

    def set_budget(self, vram: int | None) -> None:
        """Keep to another budget from the next image on; `vram` None: what was free at the start.

        Raises:
            InputError: as `plan_within`.
        """
        self._budget = self._set_budget = self._budget_of(vram)
        self.plan = None
        if self.residency is not None:
            # The plan keeps to the budget. The cap is for what the allocator holds beside it, and
            # leaves that room: libraries choose other ways, with other results, where it is tight.
            self.residency.device.cap(None if vram is None else vram - CONTEXT_BYTES // 2)

    def _budget_of(self, vram: int | None) -> Budget:
        assert self.inventory is not None
        host_bytes = self._ram
        if host_bytes is None:
            host_bytes = self._host.for_weights(self.inventory.num_bytes)
        pinned_bytes = self._host.for_pinning
        if vram is not None:
            return Budget(device_bytes=vram, host_bytes=host_bytes, pinned_bytes=pinned_bytes)
        if self._free_bytes is None:
            raise InputError("this device does not tell how much is free", hint="name an amount")
        return Budget(
            device_bytes=max(0, self._free_bytes - DESKTOP_BYTES),
            context_bytes=0,
            host_bytes=host_bytes,
            pinned_bytes=pinned_bytes,
        )

    @property
    def batch_size(self) -> int | None:
        """The most images at once that the plan allows; None: as many as are asked for."""
        return None if self.plan is None else self.plan.batch_size

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """For the time of one request: two at once would take each other's weights away.

        Raises:
            InputError: another request is being drawn, in this thread or another.
        """
        if self.residency is None:
            yield
            return
        if not self._in_use.acquire(blocking=False):
            raise InputError(
                "this model is drawing already, and its memory serves one request at a time",
                hint="wait until that one has ended, or close it: `events.close()`",
            )
        try:
            yield
        finally:
            self._in_use.release()

    def begin(self, workload: Workload) -> None:
        """Plan for what is to be drawn, and begin to load what stays.

        Raises:
            DoesNotFitError: no plan fits.
        """
        if self.residency is None or self.inventory is None or self._budget is None:
            return
        plan = before = self.plan
        if plan is None or plan.workload != workload:
            self.plan = plan = self._plan_for(self.inventory, workload, self._budget)
            if before is None or not _is_same_step(before, plan) or not _has_room_for_graph(plan):
                self._graph = None
            self._has_graphs = True
        self._phases.clear()
        self._was_least = False
        self.residency.device.reset_peak()
        self.residency.adopt(plan)

    def _plan_for(self, inventory: Inventory, workload: Workload, learnt: Budget) -> Plan:
        """Within what was learnt; where that is too little, within what was set: it may be free."""
        try:
            return make_plan(inventory, workload, learnt)
        except DoesNotFitError:
            if self._set_budget in (None, learnt):
                raise
        self._budget = self._set_budget
        return make_plan(inventory, workload, self._set_budget)

    @contextlib.contextmanager
    def phase(self, name: Phase, *, num_passes: int = 1) -> Iterator[None]:
        """The networks of a phase are there when they are called, each once a pass, in order."""
        if self.residency is None or self.plan is None:
            yield
            return
        self._phases.add(name)
        self.residency.adopt(self.plan)
        with self.residency.phase(name, num_passes=num_passes):
            yield

    def predictor(
        self, blocks: FluxBlocks, device: torch.device, num_calls: int
    ) -> Callable[..., Tensor]:
        """The blocks, or graphs of them where those repay: kept for further images if they may."""
        if self._graph is not None:
            return self._graph
        is_repaid = self._has_graphs and num_calls >= LEAST_CALLS
        if self.residency is None or self.plan is None or not is_repaid:
            return blocks
        if not StepGraph.is_possible(device):
            return blocks
        graph = StepGraph(blocks, device, self.residency.is_streamed)
        if _has_room_for_graph(self.plan):
            self._graph = graph
        return graph

    def give_up_graphs(self) -> None:
        """Let steps run as they are, for as long as the plan is made for the same."""
        self._graph, self._has_graphs = None, False

    def shrink(self) -> str:
        """Let everything go and plan for less than what has just run out -> what to tell about it.

        Where the plan was the least already, it is tried once more with caches released.

        Raises:
            DoesNotFitError: there is no smaller plan.
        """
        if self.residency is None or self.inventory is None or self.plan is None:
            raise DoesNotFitError(
                "the device has no memory left", hint="draw a smaller image, or fewer at once"
            )
        self.num_shrinks += 1
        workload, budget, peak_bytes = self.plan.workload, self.plan.budget, self.plan.peak_bytes
        least = smallest_budget(self.inventory, workload, context_bytes=budget.context_bytes)
        self._graph = None
        self.residency.forget()
        free_bytes = self.residency.device.free_bytes()
        if peak_bytes <= least:
            if self._was_least:
                raise _nothing_left(self.inventory, workload, least, free_bytes)
            self._was_least = True
        device_bytes = least + int(_SHRINK * max(0, peak_bytes - least))
        if free_bytes is not None:
            device_bytes = max(least, min(device_bytes, free_bytes + budget.context_bytes))
        self._budget = replace(budget, device_bytes=device_bytes)
        self.plan = make_plan(self.inventory, workload, self._budget)
        return (
            f"the device ran out of memory: going on within {self.plan.peak_bytes / 2**30:.2f} "
            f"GiB, with {self.plan.step_bytes / 2**30:.2f} GiB loaded in every step"
        )

    @property
    def planned_bytes(self) -> int:
        """The peak of tensors on the device, by the plan for the phases of the last image."""
        assert self.plan is not None
        planned = max(
            (phase.peak_bytes for phase in self.plan.phases if phase.name in self._phases),
            default=self.plan.peak_bytes,
        )
        graph_bytes = _graph_bytes(self.plan) if self._graph is not None else 0
        return planned - self.plan.budget.context_bytes + graph_bytes

    def surprise(self) -> str | None:
        """What to tell where the image took clearly more than its plan; None where it did not."""
        if self.residency is None or self.plan is None:
            return None
        peak_bytes, planned = self.residency.device.peak_bytes(), self.planned_bytes
        if peak_bytes is None or peak_bytes <= max(
            (1 + PEAK_TOLERANCE) * planned, planned + SLACK_BYTES
        ):
            return None
        return (
            f"device memory peaked at {peak_bytes / 2**30:.2f} GiB, and {planned / 2**30:.2f} GiB "
            "was planned"
        )


def _is_same_step(before: Plan, plan: Plan) -> bool:
    """Whether a graph of the plan before serves this one: of a step they are the same."""
    as_many_steps = replace(plan.workload, num_steps=before.workload.num_steps)
    return as_many_steps == before.workload and plan.placements == before.placements


def _has_room_for_graph(plan: Plan) -> bool:
    """Whether weights stay from image to image, and a step's activations may as well."""
    blocks = [each for each in plan.placements if each.unit.name.startswith("blocks.")]
    is_kept = all(each.use == "kept" for each in blocks)
    return is_kept and plan.peak_bytes + _graph_bytes(plan) <= plan.budget.device_bytes


def _graph_bytes(plan: Plan) -> int:
    return next(each.working_bytes for each in plan.phases if each.name == "denoise")


def _nothing_left(
    inventory: Inventory, workload: Workload, least: int, free_bytes: int | None
) -> DoesNotFitError:
    hint = "close what else uses the device"
    if free_bytes is not None:
        size = largest_size(inventory, workload, Budget(device_bytes=free_bytes, context_bytes=0))
        hint += f", or draw {size.width} x {size.height}, the largest that fits" if size else ""
    return DoesNotFitError(
        f"the device ran out of memory within {least / 2**30:.2f} GiB, the least that "
        f"{inventory.name} takes at {workload.width} x {workload.height}",
        hint=hint,
    )


def manage(
    parts: Parts,
    device: Device,
    *,
    name: str,
    dtype: torch.dtype,
    arithmetic: Arithmetic,
    vram: int | None,
    ram: int | None,
) -> ModelMemory:
    """Take modules that were built on meta under management.

    `vram` is the device memory of the whole process in bytes; None: what is free, less some for
    the desktop. `ram` is the main memory that weights may take; None: as much as they need.

    Raises:
        DoesNotFitError: there is no room even for what is always there.
        FormatError: a file cannot be read or is damaged.
    """
    components = {kind: component for kind, (_, component) in parts.items()}
    contents = take_contents(parts)
    entries = component_entries(components)
    is_fused = fused.has_kernels(device.device.type)
    # Without kernels 8 bits are imitated, which takes more than it saves.
    is_eight_bit = is_fused and arithmetic != "bf16"
    inventory = replace(
        take_inventory(name, entries, compute_bytes=dtype.itemsize, is_eight_bit=is_eight_bit),
        is_fused=is_fused,
    )
    free_bytes = device.free_bytes()
    try:
        residency = Residency(device, contents)
    except torch.OutOfMemoryError as error:
        raise DoesNotFitError(
            f"the device has no room for {name}", hint="close what else uses it"
        ) from error
    _watch(residency, {kind: module for kind, (module, _) in parts.items()})
    memory = ModelMemory(residency, weigh(inventory, contents), free_bytes=free_bytes, ram=ram)
    memory.set_budget(vram)
    return memory


def _watch(residency: Residency, modules: Mapping[ComponentKind, Any]) -> None:
    """Let units be asked for as they are used; for the VAE, with two ways in, its phase asks."""
    blocks, conditioner = modules["transformer"].blocks, modules["transformer"].conditioner
    for kind in ("double", "single"):
        for prefix, owner in (("blocks", blocks), ("conditioner", conditioner)):
            for i, layer in enumerate(getattr(owner, f"{kind}_blocks")):
                residency.watch(f"{prefix}.{kind}.{i}", layer)
    for embedder in (conditioner.time_in, conditioner.vector_in, conditioner.guidance_in):
        if embedder is not None:
            residency.watch("conditioner.embedders", embedder)
    residency.watch("conditioner.final", conditioner.final_layer)
    for i, layer in enumerate(modules["t5"].model.encoder.block):
        residency.watch(f"t5.{i}", layer)
    residency.watch("clip", modules["clip"])


@contextlib.contextmanager
def until_memory_runs_out() -> Iterator[None]:
    """Leave a block where the device has no memory left; any other error is raised."""
    try:
        yield
    except RuntimeError as error:
        is_known = isinstance(error, torch.OutOfMemoryError)
        if not is_known and not any(sign in str(error) for sign in _OUT_OF_MEMORY):
            raise


def attempt(memory: ModelMemory, compute: Callable[[], Result]) -> Generator[Notice, None, Result]:
    """`compute()`, once more within a smaller plan each time that memory runs out.

    Raises:
        DoesNotFitError: there is no smaller plan.
    """
    while True:
        with until_memory_runs_out():
            return compute()
        # Only here, without the error, is the memory free that its traceback held.
        yield Notice(message=memory.shrink())
