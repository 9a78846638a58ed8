import asyncio
import contextlib
import functools
import os
import sys

import pytest
from engines import FAKE_WORKER, finished, kinds_of, let_go, seen, submit

from flux_nf4.cluster import engine as cluster_engine
from flux_nf4.cluster import replica as replica_module
from flux_nf4.cluster.engine import ClusterEngine
from flux_nf4.cluster.replica import Replica
from flux_nf4.errors import FluxNF4Error, ModelNotFoundError
from flux_nf4.server.engine import EngineSettings
from flux_nf4.server.supervisor import Supervisor


class Frames:
    """A streaming answer, as Ray Serve's handles give it."""

    def __init__(self, router, job_id, spec):
        self._router = router
        self._arguments = job_id, spec
        self._task = None

    def cancel(self):
        self._task.cancel()

    async def __aiter__(self):
        frames = asyncio.Queue()

        async def draw():
            try:
                async with self._router.free() as chosen:
                    async for each in chosen.draw(*self._arguments):
                        frames.put_nowait(each)
                        await asyncio.sleep(0)
            except BaseException as error:
                frames.put_nowait(error)
                raise

        self._task = asyncio.create_task(draw())
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._router.drawing.append(self._task)
        while True:
            found = await frames.get()
            if isinstance(found, BaseException):
                raise found
            yield found
            if found[0]["kind"] in replica_module.LAST_FRAMES:
                return


class Router:
    """A handle on replicas in this process; each draws one job at a time."""

    def __init__(self, replicas, error):
        self._replicas = replicas
        self._idle = asyncio.Queue()
        for each in replicas:
            self._idle.put_nowait(each)
        self._error = error
        self.num_dead = 0
        self.drawing = []
        self.describe = self.draw = self

    def options(self, **_):
        return self

    def remote(self, *arguments):
        return Frames(self, *arguments) if arguments else self._replicas[0].describe()

    @contextlib.asynccontextmanager
    async def free(self):
        if self.num_dead:
            self.num_dead -= 1
            raise self._error("the router did not know that it is dead")
        chosen = await self._idle.get()
        try:
            yield chosen
        finally:
            self._idle.put_nowait(chosen)


@contextlib.asynccontextmanager
async def cluster(ray, monkeypatch, start="ready", num_replicas=1, num_slots=1):
    """An engine before replicas with fake workers, and the router between them."""
    command = [sys.executable, str(FAKE_WORKER), *start.split()]
    monkeypatch.setattr(
        replica_module, "Supervisor", functools.partial(Supervisor, command=command)
    )
    monkeypatch.setattr(cluster_engine, "_SENDING_PAUSE_S", 0.0)
    settings = EngineSettings(device="cpu")
    replicas = []
    for _ in range(num_replicas):
        made = Replica.__new__(Replica)
        await made.__init__(settings)
        replicas.append(made)
    router = Router(replicas, ray.RayError)

    async def deploy():
        return router

    engine = ClusterEngine(settings, num_slots=num_slots, deploy=deploy)
    await engine.start()
    try:
        yield engine, router
    finally:
        await engine.stop()
        for each in replicas:
            await each._worker.stop()


@pytest.fixture
def claims(ray, monkeypatch):
    """Runs a claim about a cluster in an event loop."""

    def run(claim, **options):
        async def all_of_it():
            async with cluster(ray, monkeypatch, **options) as (engine, router):
                await engine.wait_ready()
                await claim(engine, router)

        asyncio.run(all_of_it())

    return run


def test_a_job_is_drawn_as_on_one_machine(claims):
    async def claim(engine, _):
        job = await finished(engine, num_images=2)
        assert (job.state, len(job.images), job.num_attempts) == ("done", 2, 1)
        assert engine.capabilities.model == "fake"

    claims(claim)


def test_replicas_draw_side_by_side(claims, tmp_path):
    async def claim(engine, _):
        pipes = [tmp_path / name for name in ("a", "b")]
        for pipe in pipes:
            os.mkfifo(pipe)
        jobs = [submit(engine, f"hold {pipe}") for pipe in pipes]
        for job in jobs:
            await seen(job, "step")
        for pipe in pipes:
            await asyncio.to_thread(let_go, pipe)
        for job in jobs:
            await job.wait()
        assert [job.state for job in jobs] == ["done", "done"]

    claims(claim, num_replicas=2, num_slots=2)


def test_a_job_whose_worker_died_is_run_once_more_with_its_seed(claims, tmp_path):
    async def claim(engine, _):
        job = await finished(engine, f"die once {tmp_path}/died", seed=11)
        assert (job.state, job.num_attempts, job.images[0].seed) == ("done", 2, 11)
        assert "retrying" in kinds_of(job)

    claims(claim)


def test_a_job_whose_replica_died_is_run_once_more(claims, ray, tmp_path):
    async def claim(engine, router):
        job = submit(engine, f"die once {tmp_path}/died")
        await seen(job, "started")
        router.num_dead = 1
        await job.wait()
        assert job.state == "done"

    claims(claim)


def test_a_replica_that_the_router_took_for_alive_costs_no_attempt(claims):
    async def claim(engine, router):
        router.num_dead = 3
        job = await finished(engine)
        assert (job.state, job.num_attempts) == ("done", 1)

    claims(claim)


def test_where_no_replica_answers_a_job_fails_with_the_reason(claims):
    async def claim(engine, router):
        router.num_dead = 1000
        job = await finished(engine)
        assert (job.state, job.error.code) == ("failed", "worker_lost")
        assert "RayError" in job.error.message

    claims(claim)


def test_a_running_job_stops_and_its_replica_goes_on(claims, tmp_path):
    async def claim(engine, _):
        os.mkfifo(tmp_path / "pipe")
        job = submit(engine, f"hold {tmp_path}/pipe")
        await seen(job, "step")
        engine.cancel(job.id, cause="client")
        await job.wait()
        assert job.state == "cancelled"
        assert (await finished(engine)).state == "done"

    claims(claim)


def test_a_job_that_waits_for_a_replica_can_be_cancelled(claims, tmp_path):
    async def claim(engine, _):
        os.mkfifo(tmp_path / "pipe")
        first = submit(engine, f"hold {tmp_path}/pipe")
        await seen(first, "step")
        second = submit(engine)
        await seen(second, "started")  # it is in its slot, and no replica is free
        engine.cancel(second.id, cause="client")
        await second.wait()
        assert second.state == "cancelled"
        await asyncio.to_thread(let_go, tmp_path / "pipe")
        await first.wait()
        assert first.state == "done"

    claims(claim, num_slots=2)


def test_draining_finishes_what_was_accepted(claims):
    async def claim(engine, _):
        jobs = [submit(engine) for _ in range(3)]
        await engine.drain(30)
        assert [job.state for job in jobs] == ["done"] * 3

    claims(claim)


def test_who_waits_for_a_model_that_is_missing_hears_so(ray, monkeypatch):
    async def claim():
        async with cluster(ray, monkeypatch, start="unloadable") as (engine, _):
            with pytest.raises(ModelNotFoundError):
                await engine.wait_ready()

    asyncio.run(claim())


def test_who_waits_for_replicas_that_cannot_be_started_hears_so(ray):
    async def deploy():
        raise ray.RayError("the controller has died")

    async def claim():
        engine = ClusterEngine(EngineSettings(device="cpu"), num_slots=2, deploy=deploy)
        await engine.start()
        with pytest.raises(FluxNF4Error, match="no replica can be started: RayError"):
            await engine.wait_ready()
        assert engine.status().reason == "the worker was lost: the model cannot be loaded"
        await engine.stop()

    asyncio.run(claim())
