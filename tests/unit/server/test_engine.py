import asyncio
import hashlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
from engines import (
    finished,
    kinds_of,
    let_go,
    seen,
    serving,
    submit,
)
from PIL import Image

from flux_nf4.errors import InputError
from flux_nf4.server.engine import EngineSettings
from flux_nf4.server.jobs import QueueFullError


def test_a_job_tells_of_all_that_happens_to_it():
    async def claim():
        async with serving() as engine:
            job = await finished(engine)
            assert kinds_of(job) == ["queued", "started", "stage", "step", "step", "image", "done"]

    asyncio.run(claim())


def test_each_image_has_its_own_seed_and_pixels():
    async def claim():
        async with serving() as engine:
            job = await finished(engine, num_images=2, seed=40)
            pixels = [Image.open(io.BytesIO(image.png)).tobytes() for image in job.images]
            assert [image.seed for image in job.images] == [40, 41]
            assert [data[0] for data in pixels] == [40, 41]
            hashes = [hashlib.sha256(data).hexdigest() for data in pixels]
            assert [image.sha256 for image in job.images] == hashes

    asyncio.run(claim())


def test_previews_are_jpegs():
    async def claim():
        async with serving() as engine:
            job = submit(engine, num_previews=1)
            async for event in job.events():
                if event.kind == "step":
                    assert event.data["preview"].startswith(b"\xff\xd8")

    asyncio.run(claim())


def test_notices_are_told_and_kept():
    async def claim():
        async with serving() as engine:
            job = await finished(engine, "notice")
            assert job.notices == ["a notice"]
            assert "notice" in kinds_of(job)

    asyncio.run(claim())


def test_uploads_reach_the_worker():
    async def claim():
        async with serving() as engine:
            job = await finished(engine, "uploads", image=b"abc", mask_image=b"de")
            assert job.notices == ["{'image': 3, 'mask_image': 2} abcde"]

    asyncio.run(claim())


def test_a_failure_fails_only_its_own_job():
    async def claim():
        async with serving() as engine:
            failed, done = submit(engine, "fail"), submit(engine)
            await failed.wait()
            await done.wait()
            assert (failed.state, failed.error.code, failed.error.status) == (
                "failed",
                "out_of_memory",
                503,
            )
            assert (done.state, engine.status().workers[0].num_restarts) == ("done", 0)

    asyncio.run(claim())


def test_an_owner_sees_only_his_own_jobs():
    async def claim():
        async with serving() as engine:
            job = submit(engine, owner="a")
            assert engine.job(job.id, owner="b") is None
            assert (engine.jobs(owner="a"), engine.jobs(owner="b")) == ([job], [])
            await job.wait()

    asyncio.run(claim())


def test_observers_hear_the_way_of_a_job():
    async def claim():
        told = []
        async with serving() as engine:
            engine.on_event.append(lambda name, **facts: told.append(facts.get("stage", name)))
            await finished(engine, num_inference_steps=1, num_previews=1)
        drawing = ["step", "first_preview", "save", "image", "denoise"]
        assert told == ["job_queued", "job_started", *drawing, "job_finished"]

    asyncio.run(claim())


def test_a_full_queue_says_when_to_come_back(pipe):
    async def claim():
        async with serving(max_queue=1) as engine:
            held = submit(engine, f"hold {pipe}")
            await seen(held, "step")
            submit(engine)
            with pytest.raises(QueueFullError) as caught:
                submit(engine)
            assert 1 <= caught.value.retry_after_s <= 120

    asyncio.run(claim())


def test_waiting_jobs_know_their_places(pipe):
    async def claim():
        async with serving() as engine:
            held = submit(engine, f"hold {pipe}")
            await seen(held, "step")
            jobs = [submit(engine, owner=owner) for owner in "aab"]
            assert [engine.position(job) for job in [held, *jobs]] == [0, 1, 3, 2]

    asyncio.run(claim())


def test_who_waits_longer_is_told_so(pipe):
    async def claim():
        async with serving() as engine:
            held = submit(engine, f"hold {pipe}")
            await seen(held, "step")
            first, second = submit(engine), submit(engine)
            assert 0 < engine.eta_s(first) < engine.eta_s(second)

    asyncio.run(claim())


def test_nobody_knows_how_long_the_first_job_takes():
    async def claim():
        async with serving() as engine:
            job = submit(engine)
            assert engine.eta_s(job) is None
            await job.wait()

    asyncio.run(claim())


def test_an_owner_has_no_more_workers_than_he_may(pipe, tmp_path):
    async def claim():
        async with serving(device="all", max_running_per_owner=1) as engine:
            held = submit(engine, f"hold {pipe}", owner="a")
            waiting = submit(engine, owner="a")
            other = submit(engine, owner="b")
            await other.wait()
            await seen(held, "step")
            assert waiting.state == "queued"
            let_go(pipe)
            await waiting.wait()
            assert waiting.state == "done"

    asyncio.run(claim())


def test_all_starts_a_worker_on_each_device():
    async def claim():
        async with serving(device="all") as engine:
            await engine.wait_ready()
            devices = [worker.device for worker in engine.status().workers]
            assert devices == ["cuda:0", "cuda:1", "cuda:2"]

    asyncio.run(claim())


def test_the_oldest_finished_jobs_go_first():
    async def claim():
        async with serving(max_kept_jobs=2) as engine:
            jobs = [await finished(engine) for _ in range(3)]
            assert engine.jobs(owner="somebody") == jobs[1:]

    asyncio.run(claim())


def test_finished_jobs_keep_to_their_bytes():
    async def claim():
        async with serving(max_kept_bytes=0) as engine:
            jobs = [await finished(engine) for _ in range(2)]
            assert engine.jobs(owner="somebody") == jobs[1:]

    asyncio.run(claim())


def test_a_forgotten_job_is_gone():
    async def claim():
        async with serving() as engine:
            job = await finished(engine)
            engine.forget(job.id)
            assert engine.job(job.id, owner="somebody") is None

    asyncio.run(claim())


def test_a_job_that_is_not_finished_cannot_be_forgotten(pipe):
    async def claim():
        async with serving() as engine:
            job = submit(engine, f"hold {pipe}")
            engine.forget(job.id)
            assert engine.job(job.id, owner="somebody") is job

    asyncio.run(claim())


@pytest.mark.parametrize(
    "wrong", [{"max_queue": 0}, {"step_timeout_s": 0}, {"max_running_per_owner": 0}]
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        EngineSettings(**wrong)


LEAN = """
import asyncio, sys
from engines import finished, serving

async def serve():
    async with serving() as engine:
        job = await finished(engine, num_previews=1)
    print(job.state, *{"torch", "transformers", "diffusers"} & set(sys.modules))

asyncio.run(serve())
"""


def test_the_parent_draws_without_torch():
    command, folder = [sys.executable, "-c", LEAN], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["done"]
