"""The real worker's half of the memory setting, on a device that counts its bytes."""

import asyncio
import threading
from queue import SimpleQueue

import pytest
from engines import finished
from managed_models import PLENTY, worker_command

from flux_nf4.errors import DoesNotFitError
from flux_nf4.memory.plan import smallest_budget
from flux_nf4.pipeline import load
from flux_nf4.server.engine import Engine, EngineSettings
from flux_nf4.server.frames import make_shared_memory
from flux_nf4.server.jobs import JobSpec
from flux_nf4.server.worker import Worker

SPEC = JobSpec(prompt="a cat", width=64, height=64, num_inference_steps=2, seed=3)


class FakeParent:
    """Keeps what a worker says; of an image the pixels."""

    def __init__(self, path):
        exact = {"arithmetic": "bf16", "attention": "exact"}
        wishes = {"vram": PLENTY, "ram": None, "warm_up": True, **exact}
        self.settings = {"device": "cpu", "model": str(path)} | wishes
        self.shared, self.cancelled = make_shared_memory(), set()
        self.orders, self.budgets, self.answers = SimpleQueue(), SimpleQueue(), SimpleQueue()
        self.said, self.images = {}, []

    def send(self, kind, **values):
        self.said[kind] = values
        if kind == "memory":
            self.answers.put(values)

    def send_image(self, kind, image, **values):
        self.images.append(image.tobytes())


@pytest.fixture
def worker(monkeypatch, managed_folder, device):
    """Ready, with memory for everything, and answering for budgets."""
    monkeypatch.setattr(load, "managed_device", lambda *_: device)
    worker = Worker(FakeParent(managed_folder))
    threading.Thread(target=worker.plan_budgets, daemon=True).start()
    return worker


def least(worker):
    return smallest_budget(worker.model.memory.inventory, worker.own_size)


def ask(worker, vram):
    worker.parent.budgets.put({"kind": "memory", "vram": vram})
    return worker.parent.answers.get(timeout=30)


def draw(worker):
    worker.serve({"job": "a job", "spec": SPEC.to_dict(), "uploads": {}})
    assert "failed" not in worker.parent.said
    return worker.parent.images[-1]


def test_a_worker_that_is_ready_tells_its_plan(worker):
    memory = worker.parent.said["ready"]["capabilities"]["memory"]

    assert (memory["vram"], memory["device_bytes"], memory["step_bytes"]) == (PLENTY, PLENTY, 0)
    names = [phase["name"] for phase in memory["plan"]]
    assert names == ["text", "modulation", "denoise", "decode"]


def test_the_answer_is_the_plan_and_changes_nothing_yet(worker):
    before = worker.model.memory.plan

    answer = ask(worker, least(worker))
    assert answer["error"] is None
    assert answer["memory"]["device_bytes"] == least(worker)
    assert worker.model.memory.plan is before
    assert worker.parent.orders.get() == {"kind": "memory", "vram": least(worker)}


def test_a_budget_that_nothing_fits_is_answered_with_what_does(worker):
    answer = ask(worker, least(worker) - 2**20)

    assert answer["memory"] is None
    assert answer["error"]["class"] == "DoesNotFitError"
    assert answer["error"]["hint"].startswith("allow ")
    assert worker.parent.orders.empty()


def test_a_device_that_does_not_tell_what_is_free_has_no_auto(worker):
    assert ask(worker, None)["error"]["class"] == "InputError"


def test_memory_that_is_taken_away_is_free_at_once(worker, device):
    before = device.alive
    worker.set_budget(least(worker))

    assert device.alive < before


def test_a_job_tells_what_it_took(worker):
    draw(worker)

    usage = worker.parent.said["done"]["usage"]
    assert usage["budget"] == PLENTY
    assert 0 < usage["resident"] <= usage["peak"]
    assert usage["moved"] >= usage["resident"]


def test_memory_that_runs_out_while_it_draws_is_told(worker, device):
    worker.set_budget(least(worker))
    device.failing = {device.num_allocations}
    draw(worker)

    notice = worker.parent.said["notice"]
    assert notice["is_oom"]
    assert "ran out of memory" in notice["message"]


def test_images_are_the_same_within_another_budget_and_back(worker):
    image = draw(worker)
    worker.set_budget(least(worker))

    assert draw(worker) == image
    assert worker.model.memory.plan.bytes_in("device") == 0
    worker.set_budget(PLENTY)
    assert draw(worker) == image
    assert worker.model.memory.plan.bytes_in("device") > 0


def test_what_runs_out_of_memory_on_its_way_to_a_budget_is_drawn_within_less(worker, device):
    image = draw(worker)
    worker.set_budget(least(worker))
    device.limit = device.alive  # somebody else has taken the rest
    worker.set_budget(PLENTY)
    device.limit = None

    assert draw(worker) == image


def test_a_process_draws_the_same_before_and_after_it_was_given_less(managed_folder):
    settings = EngineSettings(device="cpu", model=str(managed_folder), vram=PLENTY)

    async def claim():
        engine = Engine(settings, worker_command=worker_command())
        await engine.start()
        try:
            await engine.wait_ready()
            (worker,) = engine.supervisors
            before = await finished(engine)
            plan = await worker.set_memory(2**30)
            with pytest.raises(DoesNotFitError, match="MiB of device memory"):
                await worker.set_memory(2**20)
            after = await finished(engine)
            assert plan["device_bytes"] == 2**30
            assert after.images[0].sha256 == before.images[0].sha256
            assert worker.num_restarts == 0
        finally:
            await engine.stop()

    asyncio.run(claim())
