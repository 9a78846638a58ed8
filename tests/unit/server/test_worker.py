import asyncio
import io
import subprocess
import sys

import pytest
import torch
from engines import Process, finished, kill_worker, seen, submit
from PIL import Image

from flux_nf4.errors import (
    Cancelled,
    DoesNotFitError,
    FormatError,
    InputError,
    ModelNotFoundError,
    NumericalError,
)
from flux_nf4.pipeline.events import ImageDone
from flux_nf4.pipeline.generate import generate
from flux_nf4.pipeline.image_metadata import read_image
from flux_nf4.pipeline.load import LoadSettings, load_model
from flux_nf4.pipeline.request import GenerationRequest
from flux_nf4.server.engine import Engine, EngineSettings
from flux_nf4.server.failures import describe

# The real worker; some prompts do to it what happens to others.
WORKER = """
import os, sys, time, torch
from pathlib import Path
from flux_nf4.pipeline import generate as module
from flux_nf4.pipeline.events import StepDone
from flux_nf4.server import worker

def waits(request, is_cancelled):
    match request.prompt.split():
        case ["wait", "for", "cancel"]:
            return not is_cancelled()
        case ["wait", "for", path]:
            return not Path(path).exists()
    return False

def generate(model, request, *, is_cancelled):
    events = draw(model, request, is_cancelled=is_cancelled)
    match request.prompt:
        case "out of memory":
            yield next(events)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\\nstatistics")
        case "bug":
            raise KeyError("a bug")
        case "chatty":
            os.write(1, b"a library that prints")
            print("another")
        case "threads":
            print(f"{torch.get_num_threads()} threads", file=sys.stderr)
    for event in events:
        yield event
        while isinstance(event, StepDone) and waits(request, is_cancelled):
            time.sleep(0.001)

draw, module.generate = module.generate, generate
sys.exit(worker.main())
"""


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(runner):
    engine = Engine(
        EngineSettings(device="cpu"), worker_command=[sys.executable, "-P", "-c", WORKER]
    )
    runner.run(engine.start())
    runner.run(engine.wait_ready())
    yield engine
    runner.run(engine.stop())


def upload(mode="RGB", colour="red"):
    file = io.BytesIO()
    Image.new(mode, (80, 70), colour).save(file, "PNG")
    return file.getvalue()


def test_it_draws_what_the_pipeline_draws(runner, engine):
    job = runner.run(finished(engine, "a red apple", num_images=2))

    request = GenerationRequest(
        prompt="a red apple", width=64, height=64, num_inference_steps=2, seed=7, num_images=2
    )
    events = generate(load_model(None, LoadSettings(device="cpu")), request)
    expected = [event.image.tobytes() for event in events if isinstance(event, ImageDone)]
    assert [Image.open(io.BytesIO(image.png)).tobytes() for image in job.images] == expected


def test_an_image_tells_how_to_repeat_it(runner, engine, tmp_path):
    job = runner.run(finished(engine, "a red apple", num_images=2))
    path = tmp_path / "image.png"
    path.write_bytes(job.images[1].png)

    settings = read_image(path).settings
    assert (settings.prompt, settings.seed, settings.model) == ("a red apple", 8, "flux-demo")


def test_it_tells_of_stages_and_previews(runner, engine):
    job = runner.run(finished(engine, num_previews=1))

    kinds = [event.data.get("stage", event.kind) for event in job._log]
    drawing = ["text", "modulation", "denoise", "step", "step", "decode", "image"]
    assert kinds == ["queued", "started", *drawing, "done"]


def test_a_preview_is_a_picture(runner, engine):
    async def previews():
        events = submit(engine, num_previews=1).events()
        return [event.data["preview"] async for event in events if event.data.get("preview")]

    (preview,) = runner.run(previews())
    assert Image.open(io.BytesIO(preview)).size == (64, 64)


def test_it_stops_before_the_next_step(runner, engine):
    async def claim():
        job = submit(engine, "wait for cancel")
        await seen(job, "step")
        engine.cancel(job.id, cause="client")
        await job.wait()
        return job.state, job.step

    assert runner.run(claim()) == ("cancelled", 1)


def test_it_starts_from_an_image(runner, engine):
    async def draw(**more):
        return await finished(engine, num_inference_steps=4, strength=0.5, **more)

    job = runner.run(draw(image=upload(), mask_image=upload("L", 255)))
    assert (job.state, job.num_steps) == ("done", 2)


def test_a_damaged_image_is_the_callers_fault(runner, engine):
    job = runner.run(finished(engine, image=upload()[:60]))

    assert (job.state, job.error.code, job.error.status) == ("failed", "invalid_request", 400)


def test_out_of_memory_fails_one_job_and_costs_no_worker(runner, engine):
    num_restarts = engine.status().workers[0].num_restarts
    job = runner.run(finished(engine, "out of memory"))

    assert (job.error.code, job.error.status) == ("out_of_memory", 503)
    assert job.error.message == "out of memory: CUDA out of memory. Tried to allocate 2 GiB"
    assert runner.run(finished(engine)).state == "done"
    assert engine.status().workers[0].num_restarts == num_restarts


def test_a_bug_fails_one_job(runner, engine):
    job = runner.run(finished(engine, "bug"))

    assert (job.error.code, job.error.status) == ("internal_error", 500)
    assert "KeyError" in job.error.message


def test_a_library_that_prints_disturbs_nobody(runner, engine):
    assert runner.run(finished(engine, "chatty")).state == "done"


def test_small_images_of_the_demo_model_take_one_thread(runner, engine, caplog):
    with caplog.at_level("INFO"):
        runner.run(finished(engine, "threads"))
        runner.run(finished(engine))  # by then the line is there

    assert "1 threads" in caplog.text


def test_a_killed_worker_comes_back_and_draws_the_same(runner, engine, tmp_path):
    path = tmp_path / "go-on"

    async def claim():
        job = submit(engine, f"wait for {path}", num_inference_steps=3)
        await seen(job, "step")
        kill_worker(engine)
        await seen(job, "retrying")
        path.touch()
        await job.wait()
        return job, await finished(engine, job.spec.prompt, num_inference_steps=3)

    killed, whole = runner.run(claim())
    assert (killed.state, killed.num_attempts) == ("done", 2)
    assert killed.images[0].sha256 == whole.images[0].sha256


def test_a_model_that_is_not_there_is_told_of(runner, tmp_path):
    async def claim():
        engine = Engine(EngineSettings(model=str(tmp_path / "none.safetensors"), device="cpu"))
        await engine.start()
        try:
            await engine.wait_ready()
        finally:
            await engine.stop()

    with pytest.raises(ModelNotFoundError, match=r"none\.safetensors"):
        runner.run(claim())


SERVER = """
import asyncio
from flux_nf4.server.engine import Engine, EngineSettings

async def serve():
    engine = Engine(EngineSettings(device="cpu"))
    await engine.start()
    while engine.status().workers[0].state != "loading":
        await asyncio.sleep(0.01)
    print(engine.status().workers[0].pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(serve())
"""


def test_a_worker_ends_with_its_parent_even_while_it_loads():
    with (
        subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE) as server,
        Process(int(server.stdout.readline())) as worker,
    ):
        server.kill()
        assert worker.ends()


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (DoesNotFitError("no plan"), "out_of_memory", 503),
        (MemoryError(), "out_of_memory", 503),
        (torch.OutOfMemoryError("2 GiB"), "out_of_memory", 503),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), "out_of_memory", 503),
        (InputError("`seed`"), "invalid_request", 400),
        (FormatError("the image is damaged"), "invalid_request", 400),
        (NumericalError("NaN in decode"), "numerical_error", 500),
        (Cancelled("stopped"), "internal_error", 500),
        (RuntimeError("mat1 and mat2"), "internal_error", 500),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_each_error_has_its_code(error, code, status):
    failure = describe(error)

    assert (failure["code"], failure["status"]) == (code, status)


def test_an_error_of_a_library_is_not_told_in_its_own_words():
    failure = describe(OSError("no such file: /home/somebody/.cache/kernel.so"))

    assert failure["message"] == "drawing failed: OSError"
