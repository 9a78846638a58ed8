import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from engines import (
    finished,
    let_go,
    make_engine,
    make_spec,
    seen,
    serving,
    submit,
)

from flux_nf4.errors import DiskError


def test_jobs_survive_a_restart_of_the_server(tmp_path, pipe):
    journal = tmp_path / "journal"

    async def claim():
        async with serving(journal=journal) as engine:
            held = submit(engine, f"hold {pipe}", image=b"abc")
            waiting = submit(engine, seed=99)
            await seen(held, "step")
        async with serving(journal=journal) as engine:
            back = [engine.job(job.id, owner="somebody") for job in (held, waiting)]
            assert [job.spec for job in back] == [held.spec, waiting.spec]
            await seen(back[0], "step")
            let_go(pipe)
            for job in back:
                await job.wait()
            assert [job.state for job in back] == ["done", "done"]

    asyncio.run(claim())


def test_a_client_is_told_that_his_job_goes_on(tmp_path, pipe):
    async def claim():
        async with serving(journal=tmp_path / "journal") as engine:
            job = submit(engine, f"hold {pipe}")
            await seen(job, "step")
        assert job.error.hint == "it goes on when the server is back"

    asyncio.run(claim())


def test_finished_jobs_leave_the_journal(tmp_path):
    journal = tmp_path / "journal"

    async def claim():
        async with serving(journal=journal) as engine:
            await finished(engine)
            await finished(engine, "fail")
        engine = make_engine(journal=journal)
        await engine.start()
        assert engine.jobs(owner="somebody") == []
        await engine.stop()

    asyncio.run(claim())


def test_stopping_on_purpose_counts_as_no_attempt(tmp_path, pipe):
    journal = tmp_path / "journal"

    async def claim():
        for _ in range(3):
            async with serving(journal=journal) as engine:
                job = next(iter(engine.jobs(owner="somebody")), None)
                job = job or submit(engine, f"hold {pipe}")
                await seen(job, "step")
                assert job.num_attempts == 1

    asyncio.run(claim())


def test_a_job_that_ended_two_servers_is_not_run_again(tmp_path):
    journal = tmp_path / "journal"

    async def claim():
        engine = make_engine(journal=journal)
        await engine.start()
        job = engine.submit(make_spec(), owner="somebody", api="jobs")
        engine._journal.note(job, 2)  # as after two kills of the whole server
        engine._journal.close()
        engine._journal = None
        await engine.stop()
        async with serving(journal=journal) as engine:
            (back,) = engine.jobs(owner="somebody")
            assert (back.id, back.state, back.error.code) == (job.id, "failed", "worker_lost")

    asyncio.run(claim())


def test_a_job_that_cannot_be_written_down_is_not_accepted(tmp_path):
    async def claim():
        async with serving(journal=tmp_path / "journal") as engine:
            engine._journal._connection.execute("PRAGMA max_page_count = 1")
            with pytest.raises(DiskError, match="full"):
                submit(engine, "x" * 50_000)
            assert engine.jobs(owner="somebody") == []

    asyncio.run(claim())


def test_a_server_whose_disk_is_full_is_not_ready_until_there_is_room(tmp_path):
    async def claim():
        async with serving(journal=tmp_path / "journal") as engine:
            await engine.wait_ready()
            limit = engine._journal._connection.execute
            limit("PRAGMA max_page_count = 1")
            with pytest.raises(DiskError):
                submit(engine, "x" * 50_000)
            assert engine.status().reason == "the disk is full, or cannot be written to"
            assert not engine.status().is_ready
            limit("PRAGMA max_page_count = 100000")
            assert engine.status().is_ready
            assert (await finished(engine)).state == "done"

    asyncio.run(claim())


SERVER = """
import asyncio, sys
from pathlib import Path
from engines import make_engine, seen, submit

async def serve(journal, pipe):
    engine = make_engine(journal=Path(journal))
    await engine.start()
    held, waiting = submit(engine, f"hold {pipe}"), submit(engine, seed=99)
    await seen(held, "step")
    print(held.id, waiting.id, flush=True)
    await asyncio.Event().wait()

asyncio.run(serve(*sys.argv[1:]))
"""


def test_jobs_survive_the_death_of_the_server(tmp_path, pipe):
    journal, folder = tmp_path / "journal", Path(__file__).parents[2]
    command = [sys.executable, "-c", SERVER, str(journal), str(pipe)]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        ids = server.stdout.readline().split()
        server.kill()

    async def claim():
        async with serving(journal=journal) as engine:
            jobs = [engine.job(job_id, owner="somebody") for job_id in ids]
            await seen(jobs[0], "step")
            let_go(pipe)
            for job in jobs:
                await job.wait()
            assert [(job.state, job.images[0].seed) for job in jobs] == [("done", 7), ("done", 99)]
            assert [job.num_attempts for job in jobs] == [2, 1]

    asyncio.run(claim())


def test_whoever_listens_hears_of_the_jobs_that_are_taken_up(tmp_path, pipe):
    journal = tmp_path / "journal"

    async def claim():
        async with serving(journal=journal) as engine:
            job = submit(engine, f"hold {pipe}")
            await seen(job, "step")
        engine, told = make_engine(journal=journal), []
        engine.on_event.append(lambda name, **facts: told.append((name, facts.get("job"))))
        await engine.start()
        await engine.stop()
        ((_, back),) = (each for each in told if each[0] == "replayed")
        assert (back.id, back.created_at) == (job.id, job.created_at)

    asyncio.run(claim())
