import asyncio
import contextlib
import os
from pathlib import Path

import pytest
from engines import (
    Process,
    finished,
    make_engine,
    seen,
    serving,
    submit,
)

from flux_nf4.server.jobs import DrainingError


def test_a_waiting_job_is_cancelled_at_once(pipe):
    async def claim():
        async with serving() as engine:
            held = submit(engine, f"hold {pipe}")
            await seen(held, "step")
            job = submit(engine)
            assert engine.cancel(job.id, cause="client")
            assert (job.state, job.error) == ("cancelled", None)

    asyncio.run(claim())


def test_a_running_job_stops_and_its_worker_goes_on(pipe):
    async def claim():
        async with serving() as engine:
            held = submit(engine, f"hold {pipe}")
            await seen(held, "step")
            assert engine.cancel(held.id, cause="client")
            await held.wait()
            assert held.state == "cancelled"
            assert (await finished(engine)).state == "done"
            assert engine.status().workers[0].num_restarts == 0

    asyncio.run(claim())


@pytest.mark.parametrize("prompt", ["deaf", "busy"])
def test_a_worker_that_does_not_stop_is_killed(prompt):
    async def claim():
        async with serving(step_timeout_s=1.5) as engine:
            job = submit(engine, prompt)
            await seen(job, "step")
            engine.cancel(job.id, cause="disconnect")
            await job.wait()
            assert job.state == "cancelled"
            assert (await finished(engine)).state == "done"

    asyncio.run(claim())


def test_a_finished_job_cannot_be_cancelled():
    async def claim():
        async with serving() as engine:
            job = await finished(engine)
            assert not engine.cancel(job.id, cause="client")
            assert job.state == "done"

    asyncio.run(claim())


def test_nothing_is_cancelled_under_an_unknown_id():
    assert not make_engine().cancel("job_0", cause="client")


def test_what_took_too_long_failed(pipe):
    async def claim():
        async with serving() as engine:
            held = submit(engine, f"hold {pipe}")
            await seen(held, "step")
            engine.cancel(held.id, cause="timeout")
            await held.wait()
            assert (held.state, held.error.code, held.error.status) == ("failed", "timeout", 503)

    asyncio.run(claim())


def test_cancelling_at_any_moment_leaves_a_worker_that_draws():
    async def claim():
        async with serving() as engine:
            for pause in range(12):
                job = submit(engine, num_inference_steps=5)
                reader = job.events()
                with contextlib.suppress(StopAsyncIteration):
                    for _ in range(pause):
                        await anext(reader)
                engine.cancel(job.id, cause="client")
                await job.wait()
                assert job.state in ("cancelled", "done")
            assert (await finished(engine)).state == "done"

    asyncio.run(claim())


def test_draining_finishes_what_was_accepted():
    async def claim():
        async with serving() as engine:
            jobs = [submit(engine) for _ in range(3)]
            await engine.drain(60)
            assert {job.state for job in jobs} == {"done"}

    asyncio.run(claim())


def test_draining_takes_nothing_new():
    async def claim():
        async with serving() as engine:
            await engine.drain(60)
            with pytest.raises(DrainingError):
                submit(engine)
            assert engine.status().is_draining
            assert not engine.status().is_ready

    asyncio.run(claim())


def test_draining_waits_no_longer_than_it_may(pipe):
    async def claim():
        async with serving() as engine:
            job = submit(engine, f"hold {pipe}")
            await engine.drain(0.01)
            assert not job.is_finished

    asyncio.run(claim())


def test_stopping_ends_every_job(pipe):
    async def claim():
        async with serving() as engine:
            held = submit(engine, f"hold {pipe}")
            waiting = submit(engine)
            await seen(held, "step")
        for job in (held, waiting):
            assert (job.state, job.error.code, job.error.status) == ("cancelled", "shutdown", 503)

    asyncio.run(claim())


def test_stopping_ends_the_worker_and_its_children(tmp_path):
    async def claim():
        async with serving(f"child {tmp_path}/child") as engine:
            await engine.wait_ready()
            child = Process(int((tmp_path / "child").read_text()))
            worker = Process(engine.status().workers[0].pid)
        with child, worker:
            assert worker.ends()
            assert child.ends()

    asyncio.run(claim())


def test_stopping_before_a_worker_is_ready_ends_it():
    async def claim():
        engine = make_engine("mute")
        await engine.start()
        await engine.stop()
        assert engine.status().workers[0].pid is None

    asyncio.run(claim())


def test_stopping_twice_at_once_is_stopping(pipe):
    async def claim():
        async with serving() as engine:
            job = submit(engine, f"hold {pipe}")
            await seen(job, "step")
            gentle = asyncio.create_task(engine.stop())
            await asyncio.sleep(0)
            gentle.cancel()
            await engine.stop()
            assert job.state == "cancelled"
            assert engine.status().workers[0].pid is None

    asyncio.run(claim())


def test_no_shared_memory_is_left_behind():
    def num_memories():
        links = [os.fspath(path) for path in Path("/proc/self/fd").iterdir()]
        files = [os.path.realpath(link) for link in links]
        return sum("flux-nf4 pixels" in file for file in files)

    async def claim():
        async with serving() as engine:
            await finished(engine, "die")
            await finished(engine)
            assert num_memories() == 1
        assert num_memories() == 0

    asyncio.run(claim())
