import asyncio
import errno
import signal

import pytest
from engines import (
    finished,
    heard,
    kill_worker,
    kinds_of,
    seen,
    serving,
    submit,
)

from flux_nf4.errors import ModelNotFoundError
from flux_nf4.server.jobs import JobError, NotReadyError
from flux_nf4.server.status import EngineSettings
from flux_nf4.server.supervisor import Supervisor


def test_a_job_whose_worker_died_is_run_once_more(tmp_path):
    async def claim():
        async with serving() as engine:
            job = await finished(engine, f"die once {tmp_path}/died")
            assert (job.state, job.num_attempts, len(job.images)) == ("done", 2, 1)
            assert "retrying" in kinds_of(job)
            assert engine.status().workers[0].num_restarts == 1

    asyncio.run(claim())


def test_a_job_whose_worker_died_twice_fails_with_the_reason():
    async def claim():
        async with serving() as engine:
            job = await finished(engine, "die")
            assert (job.state, job.error.code) == ("failed", "worker_lost")
            assert job.error.message.endswith("it was ended by SIGKILL")

    asyncio.run(claim())


def test_a_worker_that_hangs_is_killed_and_its_job_run_again(tmp_path):
    async def claim():
        async with serving(step_timeout_s=1.5) as engine:
            job = await finished(engine, f"hang once {tmp_path}/hung")
            assert (job.state, job.num_attempts) == ("done", 2)

    asyncio.run(claim())


def test_a_worker_that_is_stopped_is_killed_and_its_job_run_again(pipe):
    async def claim():
        async with serving(step_timeout_s=1.5) as engine:
            job = submit(engine, f"hold {pipe}")
            await seen(job, "step")
            kill_worker(engine, signal.SIGSTOP)
            await seen(job, "retrying")
            assert engine.status().workers[0].num_restarts == 1

    asyncio.run(claim())


@pytest.mark.parametrize("prompt", ["garbage", "stranger", "quit", "huge"])
def test_a_worker_that_talks_nonsense_is_replaced(prompt):
    async def claim():
        async with serving() as engine:
            job = await finished(engine, prompt)
            assert (job.state, job.error.code) == ("failed", "worker_lost")
            assert (await finished(engine)).state == "done"

    asyncio.run(claim())


def test_an_idle_worker_that_dies_is_replaced():
    async def claim():
        async with serving() as engine:
            await engine.wait_ready()
            kill_worker(engine)
            await heard(engine, "worker_restarted")
            assert (await finished(engine)).state == "done"

    asyncio.run(claim())


def test_workers_that_die_over_and_over_lose_no_job(tmp_path):
    async def claim():
        async with serving() as engine:
            prompts = [f"die once {tmp_path}/{number}" for number in range(3)] + ["draw"] * 3
            jobs = [submit(engine, each, seed=seed) for seed, each in enumerate(prompts)]
            for job in jobs:
                await job.wait()
            assert [job.state for job in jobs] == ["done"] * 6
            assert [job.images[0].seed for job in jobs] == list(range(6))

    asyncio.run(claim())


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        ("exit", "exited with code 1"),
        ("garbage", "no message"),
        ("unloadable", "the model cannot be loaded"),
    ],
)
def test_a_worker_that_cannot_start_is_told_of(start, reason):
    async def claim():
        async with serving(start) as engine:
            assert not engine.status().is_ready
            await heard(engine, "worker_restarted")
            assert reason in engine.status().reason
            assert not engine.status().is_ready

    asyncio.run(claim())


@pytest.mark.parametrize(
    ("start", "words"), [("exit", "no such luck"), ("unloadable", "such model")]
)
def test_what_a_worker_said_last_is_for_the_log_alone(start, words, caplog):
    async def claim():
        async with serving(start) as engine:
            with caplog.at_level("INFO", "flux_nf4"):
                await heard(engine, "worker_restarted")
            assert words not in engine.status().reason
            assert words in caplog.text

    asyncio.run(claim())


def test_a_worker_that_cannot_be_started_for_want_of_files_is_tried_again(monkeypatch):
    def refuse():
        raise OSError(errno.EMFILE, "Too many open files")

    async def claim():
        with monkeypatch.context() as patched:
            patched.setattr("flux_nf4.server.supervisor.make_shared_memory", refuse)
            async with serving() as engine:
                facts = await heard(engine, "worker_restarted")
                assert facts["reason"] == "it could not be started: Too many open files"
                patched.undo()
                assert (await finished(engine)).state == "done"

    asyncio.run(claim())


def test_a_worker_whose_end_is_awaited_is_given_no_job(monkeypatch):
    async def claim():
        async with serving() as engine:
            await engine.wait_ready()
            jobs = []
            with monkeypatch.context() as patched:
                kill = Supervisor._kill

                def kill_and_submit(self, reason=None):
                    kill(self, reason)
                    jobs.append(submit(engine))

                patched.setattr(Supervisor, "_kill", kill_and_submit)
                kill_worker(engine)
                await heard(engine, "worker_restarted")
            for job in jobs:
                await job.wait()
            assert [(job.state, job.num_attempts) for job in jobs] == [("done", 1)] * len(jobs)

    asyncio.run(claim())


def test_where_all_workers_have_failed_nothing_more_is_accepted():
    async def claim():
        async with serving("exit") as engine:
            for _ in range(3):
                await heard(engine, "worker_restarted")
            with pytest.raises(NotReadyError, match="the worker was lost: it exited with code 1"):
                submit(engine)

    asyncio.run(claim())


def test_a_worker_that_fails_over_and_over_is_called_failed():
    async def claim():
        async with serving("exit") as engine:
            for _ in range(3):
                await heard(engine, "worker_restarted")
            assert engine.status().workers[0].state == "failed"

    asyncio.run(claim())


def test_a_worker_that_others_kill_while_it_loads_is_not_called_failed():
    async def claim():
        async with serving("killed") as engine:
            for _ in range(5):
                await heard(engine, "worker_restarted")
            assert engine.status().workers[0].state != "failed"

    asyncio.run(claim())


def test_a_worker_that_is_not_ready_in_time_is_killed():
    async def claim():
        async with serving("mute", load_timeout_s=0.3) as engine:
            facts = await heard(engine, "worker_restarted")
            assert facts["reason"] == "it was not ready in time for 0.3 s"

    asyncio.run(claim())


def test_who_waits_for_a_model_that_is_missing_hears_so():
    async def claim():
        async with serving("unloadable") as engine:
            with pytest.raises(ModelNotFoundError, match="no such model"):
                await engine.wait_ready()

    asyncio.run(claim())


@pytest.mark.parametrize(
    ("device", "asked_s", "timeout_s"), [("cuda:0", None, 120), ("cpu", None, 600), ("cpu", 7, 7)]
)
def test_a_cpu_has_more_time_for_a_step(device, asked_s, timeout_s):
    supervisor = Supervisor(device, EngineSettings(step_timeout_s=asked_s), None)

    assert supervisor._step_timeout_s == timeout_s


@pytest.mark.parametrize(
    "error", [OSError("no /home/me"), MemoryError(), RuntimeError("can't start new thread")]
)
def test_an_image_that_cannot_be_made_fails_its_job_alone(error, monkeypatch):
    def fail(*_):
        raise error

    async def claim():
        async with serving() as engine:
            with monkeypatch.context() as patched:
                patched.setattr("flux_nf4.server.running.encode_png", fail)
                job = await finished(engine, num_images=3)
            assert (job.state, job.error.code) == ("failed", "internal_error")
            assert job.error.message == "its image could not be made"
            assert (await finished(engine)).state == "done"

    asyncio.run(claim())


def test_an_error_that_lacks_its_fields_is_an_error_all_the_same(monkeypatch):
    async def claim():
        async with serving() as engine:
            with monkeypatch.context() as patched:
                patched.setattr("flux_nf4.server.engine.JobError", lambda **_: JobError())
                job = await finished(engine, "fail")
            assert (job.state, job.error.code) == ("failed", "internal_error")

    asyncio.run(claim())
