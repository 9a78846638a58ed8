"""A worker process: one model on one device, told what to do in frames on standard input.

It answers in frames on what was its standard output; everything that libraries print there goes to
standard error. It ends with its parent, however that ends. What it says, by `kind`:

    hello    device, num_devices           before the model is loaded
    loading  stage                         a sign of life
    ready    capabilities, usage (of memory, or null)
    unloadable  error                      the model cannot be loaded; the process ends
    stage    job, stage                    a sign of life, as is every frame of a job
    step     job, step, num_steps, preview (its width and height; the pixels are shared), or null
    notice   job, message, is_oom (it tells that memory ran out, and of a smaller plan)
    image    job, index, seed, width, height   the RGB pixels are shared
    done, cancelled, failed   job, usage, and for the last: error
    memory   memory (the plan for another budget), or error

and what it is told: `settings` (first of all), `job`, `cancel`, `memory` (another budget), and
`taken` (the shared pixels are copied).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from flux_nf4.errors import Cancelled, DoesNotFitError, FluxNF4Error
from flux_nf4.pipeline.image_file import decode_image
from flux_nf4.server.failures import FAULTS, describe, describe_for_parent
from flux_nf4.server.frames import take_shared
from flux_nf4.server.jobs import JobSpec
from flux_nf4.server.model_facts import capabilities
from flux_nf4.server.parent import Parent
from flux_nf4.server.warm_up import warm_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image

    from flux_nf4.memory.placement import Plan
    from flux_nf4.pipeline.events import Event
    from flux_nf4.pipeline.request import GenerationRequest

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> int:
    """Serve until the parent goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = Parent()
    parent.send("loading", stage="libraries")
    try:
        worker = Worker(parent)
    except FluxNF4Error as error:
        parent.send("unloadable", error=describe_for_parent(error))
        return 1
    if worker.own_size is not None:
        threading.Thread(target=worker.plan_budgets, daemon=True).start()
    while True:
        order = parent.orders.get()
        if order["kind"] == "memory":
            worker.set_budget(order["vram"])
        else:
            worker.serve(order)


class Worker:
    """A loaded model, and the jobs it draws.

    Raises:
        FluxNF4Error: the model cannot be loaded.
    """

    def __init__(self, parent: Parent) -> None:
        import torch

        from flux_nf4.pipeline.load import LoadSettings, load_model, resolve_device
        from flux_nf4.pipeline.warm_up import repays

        self.parent = parent
        self.default_threads = torch.get_num_threads()
        wish = parent.settings["device"]
        device = resolve_device("auto" if wish == "all" else wish)
        num_devices = 1
        if device.type == "cuda":
            num_devices = torch.cuda.device_count()
            device = torch.device("cuda", device.index or 0)
            torch.cuda.set_device(device)
        parent.send("hello", device=str(device), num_devices=num_devices)
        parent.send("loading", stage="weights")
        path = parent.settings["model"]
        self.model = load_model(
            path,
            LoadSettings(
                device=str(device),
                **{
                    name: parent.settings[name]
                    for name in ("vram", "ram", "arithmetic", "attention")
                },
            ),
        )
        plan = self.model.memory.plan
        self.own_size = None if plan is None else plan.workload
        is_gpu = device.type == "cuda"
        self.total_bytes = torch.cuda.mem_get_info(device)[1] if is_gpu else None
        memory = None if plan is None else self._memory(plan, parent.settings["vram"])
        if parent.settings["warm_up"] and repays(device):
            is_warm = warm_up(self.model, partial(parent.send, "loading", stage="warm-up"))
            if not is_warm and not self._is_sound():
                _give_up()
        parent.send(
            "ready",
            capabilities=capabilities(self.model, is_demo=path is None, memory=memory),
            usage=self._usage(),
        )

    def plan_budgets(self) -> None:
        """Answer for other budgets at once, for ever; each counts when the job in hand is done."""
        assert self.own_size is not None
        while True:
            order = self.parent.budgets.get()
            try:
                plan = self.model.memory.plan_within(order["vram"], self.own_size)
            except FluxNF4Error as error:
                self.parent.send("memory", memory=None, error=describe_for_parent(error))
            else:
                self.parent.orders.put(order)
                self.parent.send("memory", memory=self._memory(plan, order["vram"]), error=None)

    def set_budget(self, vram: int | None) -> None:
        """Follow another budget; what it takes away is free for others when this returns."""
        from flux_nf4.pipeline.model_memory import attempt

        memory = self.model.memory
        assert self.own_size is not None
        assert memory.residency is not None
        memory.set_budget(vram)
        with contextlib.suppress(DoesNotFitError):  # memory ran out; a smaller image may fit
            for _ in attempt(memory, partial(memory.begin, self.own_size)):
                pass
        memory.residency.device.release()

    def _memory(self, plan: Plan, vram: int | None) -> dict[str, Any]:
        """A plan as `Capabilities.memory` tells it."""
        return {
            "vram": vram,
            "device_bytes": plan.budget.device_bytes,
            "total_bytes": self.total_bytes,
            "step_bytes": plan.step_bytes,
            "plan": [{"name": phase.name, "peak_bytes": phase.peak_bytes} for phase in plan.phases],
        }

    def serve(self, order: dict[str, Any]) -> None:
        """Draw one job's images; whatever it comes to, the parent is told."""
        job_id = order["job"]
        failure = None
        try:
            self._draw(job_id, self._request(order))
        except Cancelled:
            self.parent.send("cancelled", job=job_id, usage=self._usage())
        except FAULTS as error:
            failure = describe(error)
            if failure["status"] >= 500:
                traceback.print_exc()
        else:
            self.parent.send("done", job=job_id, usage=self._usage())
        self.parent.cancelled.discard(job_id)
        # Only here, without the error, is the memory free that its traceback held.
        if failure is not None:
            self._fail(job_id, failure)

    def _fail(self, job_id: str, failure: dict[str, Any]) -> None:
        is_sound = self._is_sound()
        if is_sound or failure["code"] == "out_of_memory":
            self.parent.send("failed", job=job_id, usage=self._usage(), error=failure)
        if not is_sound:
            _give_up()

    def _usage(self) -> dict[str, int] | None:
        """What the last images took of the device: `WorkerStatus.usage`."""
        memory = self.model.memory
        if memory.residency is None or memory.plan is None:
            return None
        return {
            "budget": memory.plan.budget.device_bytes,
            "resident": memory.plan.bytes_in("device"),
            "peak": memory.residency.device.peak_bytes() or 0,
            "moved": memory.residency.moved_bytes,
        }

    def _request(self, order: dict[str, Any]) -> GenerationRequest:
        images: dict[str, Image] = {}
        offset = 0
        for name, size_bytes in order["uploads"].items():
            data = take_shared(self.parent.shared, size_bytes, offset)
            images[name] = decode_image(data, f"the {name.replace('_', ' ')}")
            offset += size_bytes
        return JobSpec.from_dict(order["spec"], {}).to_request(**images)

    def _draw(self, job_id: str, request: GenerationRequest) -> None:
        from flux_nf4.pipeline import events

        memory = self.model.memory
        num_shrinks = memory.num_shrinks
        for event in self._events(request, job_id):
            match event:
                case events.StageStarted():
                    self.parent.send("stage", job=job_id, stage=event.stage)
                case events.StepDone():
                    values = {"job": job_id, "step": event.step, "num_steps": event.num_steps}
                    if event.preview is None:
                        self.parent.send("step", **values, preview=None)
                    else:
                        self.parent.send_image("step", event.preview, **values)
                case events.Notice():
                    is_oom = memory.num_shrinks > num_shrinks
                    num_shrinks = memory.num_shrinks
                    values = {"job": job_id, "message": event.message, "is_oom": is_oom}
                    self.parent.send("notice", **values)
                case events.ImageDone():
                    values = {"job": job_id, "index": event.index, "seed": event.seed}
                    self.parent.send_image("image", event.image, **values)

    def _events(self, request: GenerationRequest, job_id: str) -> Iterator[Event]:
        import torch

        from flux_nf4.pipeline.generate import generate
        from flux_nf4.pipeline.threads import suited_num_threads

        width, height = request.width, request.height
        otherwise = self.default_threads
        torch.set_num_threads(suited_num_threads(self.model, width, height, otherwise=otherwise))
        return generate(self.model, request, is_cancelled=lambda: job_id in self.parent.cancelled)

    def _is_sound(self) -> bool:
        """Whether the device still answers; after some errors CUDA never does again."""
        import torch

        if self.model.device.type != "cuda":
            return True
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
        return True


def _give_up() -> NoReturn:
    """Let the next worker have a device that works, and the job if need be."""
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
