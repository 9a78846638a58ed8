"""The image before the first job, on a device that counts its bytes."""

import asyncio
import sys
from pathlib import Path

import pytest
import torch
from engines import finished, submit
from fake_device import Counting, FakeDevice
from managed_models import PLENTY, draw, wish
from tiny_pipeline import save_tiny_folder, tiny_parts

from flux_nf4.memory.plan import smallest_budget
from flux_nf4.model.step_graph import LEAST_CALLS
from flux_nf4.pipeline import generate, load
from flux_nf4.pipeline.events import StepDone
from flux_nf4.pipeline.load import LoadSettings, load_model
from flux_nf4.server.engine import Engine, EngineSettings
from flux_nf4.server.metrics import Metrics
from flux_nf4.server.warm_up import repays, warm_up

# The real worker on a device that pretends to repay a warm-up; its jobs it draws as ever.
PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
from fake_device import FakeDevice
from flux_nf4.pipeline import load
from flux_nf4.server import worker
load.managed_device = lambda *_: FakeDevice()
worker.repays = lambda device: True
sys.exit(worker.main())
"""
# The same, and each warm-up comes to a bad end.
FAILING = PROCESS.replace(
    "sys.exit",
    """
from flux_nf4.pipeline import generate
draw = generate.generate
def fail(model, request, **more):
    if request.prompt == "warm-up":
        raise RuntimeError("no kernel image is available")
    return draw(model, request, **more)
generate.generate = fail
sys.exit""",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    parts = tiny_parts(num_double_blocks=3, num_single_blocks=4)
    return save_tiny_folder(tmp_path_factory.mktemp("worker_warm_up") / "model", models=parts)


@pytest.fixture
def device():
    return FakeDevice()


@pytest.fixture
def model(monkeypatch, folder, device):
    monkeypatch.setattr(load, "managed_device", lambda *_: device)
    return load_model(folder, LoadSettings(device="cpu", vram=PLENTY))


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: requests, and events of all of them."""
    requests, events, original = [], [], generate.generate

    def watch(model, request, **more):
        requests.append(request)
        for event in original(model, request, **more):
            events.append(event)
            yield event

    monkeypatch.setattr(generate, "generate", watch)
    return requests, events


def with_worker(folder, claim, source=PROCESS, **settings):
    command = [sys.executable, "-P", "-c", source, str(Path(__file__).parents[2])]
    settings = EngineSettings(device="cpu", model=str(folder), vram=PLENTY, **settings)

    async def run():
        engine = Engine(settings, worker_command=command)
        metrics = Metrics(engine)
        engine.on_event.append(metrics.observe)
        await engine.start()
        try:
            await engine.wait_ready()
            await claim(engine, metrics.registry)
        finally:
            await engine.stop()

    asyncio.run(run())


def test_only_a_gpu_repays_a_warm_up():
    assert repays(torch.device("cuda:1"))
    assert not repays(torch.device("cpu"))


def test_one_image_of_the_models_own_size_is_drawn(model, drawn):
    assert warm_up(model, lambda: None)

    (request,) = drawn[0]
    assert (request.width, request.height) == (model.facts.default_size,) * 2
    assert request.num_images == 1


def test_its_steps_are_enough_for_a_graph_that_is_kept(model, drawn):
    warm_up(model, lambda: None)

    assert sum(isinstance(event, StepDone) for event in drawn[1]) > LEAST_CALLS


def test_every_step_is_a_sign_of_life(model, drawn):
    signs = []
    warm_up(model, lambda: signs.append(1))

    assert len(signs) == len(drawn[1]) > LEAST_CALLS


def test_memory_that_runs_out_in_it_is_a_note_and_no_more(model, device, capsys):
    expected = draw(model, wish())
    device.limit = 0  # somebody else has taken everything
    with Counting(device):
        assert not warm_up(model, lambda: None)
    device.limit = None

    said = capsys.readouterr().err
    assert "no warm-up: out of memory" in said
    assert "Traceback" not in said
    assert draw(model, wish())[0] == expected[0]


def test_memory_that_runs_out_once_costs_no_warm_up(model, device, capsys):
    memory = model.memory
    memory.set_budget(smallest_budget(memory.inventory, memory.plan.workload))
    device.failing = {device.num_allocations}
    assert warm_up(model, lambda: None)

    assert "warm-up: the device ran out of memory: going on within" in capsys.readouterr().err


def test_a_bug_in_it_is_told_in_full(model, monkeypatch, capsys):
    monkeypatch.setattr(generate, "generate", lambda *_: 1 / 0)
    assert not warm_up(model, lambda: None)

    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said
    assert "no warm-up: drawing failed" in said


def test_a_process_that_is_warm_has_counted_no_request_and_told_its_memory(folder):
    async def claim(engine, registry):
        counted = {metric.name: metric.samples for metric in registry.collect()}
        assert counted["flux_nf4_requests"] == []
        assert counted["flux_nf4_images"][0].value == 0
        assert counted["flux_nf4_steps"][0].value == 0
        assert counted["flux_nf4_weights_resident_bytes"][0].value > 0
        assert engine.jobs(owner="somebody") == []

    with_worker(folder, claim)


def test_the_plan_that_is_told_is_the_same_with_a_warm_up_or_without(folder):
    told = []

    async def claim(engine, registry):
        told.append(engine.capabilities.memory)

    with_worker(folder, claim)
    with_worker(folder, claim, warm_up=False)
    assert told[0] == told[1]


def test_a_process_draws_the_same_with_a_warm_up_or_without(folder):
    images = []

    async def claim(engine, registry):
        images.append((await finished(engine)).images[0].sha256)

    with_worker(folder, claim)
    with_worker(folder, claim, warm_up=False)
    assert images[0] == images[1]


def test_a_warm_up_may_take_longer_than_a_step(folder):
    async def claim(engine, registry):
        assert engine.status().workers[0].num_restarts == 0

    with_worker(folder, claim, step_timeout_s=0.01)


def test_a_process_whose_warm_up_fails_draws_all_the_same(folder):
    async def claim(engine, registry):
        job = submit(engine)
        await job.wait()
        assert job.state == "done"
        assert engine.status().workers[0].num_restarts == 0

    with_worker(folder, claim, FAILING)
