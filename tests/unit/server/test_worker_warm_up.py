"""The image before the first job, on a device that counts its bytes."""

import asyncio
from types import SimpleNamespace

import pytest
from engines import finished, submit
from fake_device import Counting
from managed_models import PLENTY, WORKER, draw, wish, worker_command

from flux_nf4.memory.plan import smallest_budget
from flux_nf4.model.step_graph import LEAST_CALLS
from flux_nf4.pipeline import generate, load
from flux_nf4.pipeline.load import LoadSettings, load_model
from flux_nf4.server.engine import Engine, EngineSettings
from flux_nf4.server.metrics import Metrics
from flux_nf4.server.warm_up import warm_up

# The real worker on a device that pretends to repay a warm-up; its jobs it draws as ever.
PROCESS = WORKER.replace(
    "sys.exit",
    "from flux_nf4.pipeline import warm_up\nwarm_up.repays = lambda device: True\nsys.exit",
)
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


@pytest.fixture
def model(monkeypatch, managed_folder, device):
    monkeypatch.setattr(load, "managed_device", lambda *_: device)
    return load_model(managed_folder, LoadSettings(device="cpu", vram=PLENTY))


@pytest.fixture
def drawn(monkeypatch):
    """Events of all that is drawn."""
    events, original = [], generate.generate

    def watch(model, request, **more):
        for event in original(model, request, **more):
            events.append(event)
            yield event

    monkeypatch.setattr(generate, "generate", watch)
    return events


def with_worker(folder, claim, source=PROCESS, **settings):
    settings = EngineSettings(device="cpu", model=str(folder), vram=PLENTY, **settings)

    async def run():
        engine = Engine(settings, worker_command=worker_command(source))
        metrics = Metrics(engine)
        engine.on_event.append(metrics.observe)
        await engine.start()
        try:
            await engine.wait_ready()
            await claim(engine, metrics.registry)
        finally:
            await engine.stop()

    asyncio.run(run())


def test_every_step_is_a_sign_of_life(model, drawn):
    signs = []
    warm_up(model, lambda: signs.append(1))

    assert len(signs) == len(drawn) > LEAST_CALLS


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


@pytest.fixture(scope="module")
def warm_and_cold(managed_folder):
    """What a process that is warm tells and then draws, and one that had no warm-up."""
    found = []

    async def claim(engine, registry):
        ready = SimpleNamespace(
            counted={metric.name: metric.samples for metric in registry.collect()},
            jobs=engine.jobs(owner="somebody"),
            memory=engine.capabilities.memory,
        )
        ready.image = (await finished(engine)).images[0].sha256
        found.append(ready)

    with_worker(managed_folder, claim)
    with_worker(managed_folder, claim, warm_up=False)
    return found


def test_a_process_that_is_warm_has_counted_no_request_and_told_its_memory(warm_and_cold):
    warm, _ = warm_and_cold
    assert warm.counted["flux_nf4_requests"] == []
    assert warm.counted["flux_nf4_images"][0].value == 0
    assert warm.counted["flux_nf4_steps"][0].value == 0
    assert warm.counted["flux_nf4_weights_resident_bytes"][0].value > 0
    assert warm.jobs == []


def test_the_plan_that_is_told_is_the_same_with_a_warm_up_or_without(warm_and_cold):
    warm, cold = warm_and_cold
    assert warm.memory == cold.memory


def test_a_process_draws_the_same_with_a_warm_up_or_without(warm_and_cold):
    warm, cold = warm_and_cold
    assert warm.image == cold.image


def test_a_warm_up_may_take_longer_than_a_step(managed_folder):
    async def claim(engine, registry):
        assert engine.status().workers[0].num_restarts == 0

    with_worker(managed_folder, claim, step_timeout_s=0.01)


def test_a_process_whose_warm_up_fails_draws_all_the_same(managed_folder):
    async def claim(engine, registry):
        job = submit(engine)
        await job.wait()
        assert job.state == "done"
        assert engine.status().workers[0].num_restarts == 0

    with_worker(managed_folder, claim, FAILING)
