"""Engines before the fake worker, and what tests ask of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import sys
from pathlib import Path

from flux_nf4.server.engine import Engine, EngineSettings
from flux_nf4.server.jobs import JobSpec

FAKE_WORKER = Path(__file__).with_name("fake_worker.py")


def make_spec(prompt="draw", **more):
    values = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 7}
    return JobSpec(prompt=prompt, **(values | more))


def make_engine(start="ready", **settings):
    command = [sys.executable, str(FAKE_WORKER), *start.split()]
    return Engine(EngineSettings(**settings), worker_command=command)


@contextlib.asynccontextmanager
async def serving(start="ready", **settings):
    """A started engine; it is stopped afterwards."""
    engine = make_engine(start, **settings)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def submit(engine, prompt="draw", *, owner="somebody", **more):
    return engine.submit(make_spec(prompt, **more), owner=owner, api="jobs")


async def finished(engine, prompt="draw", **more):
    """A job that was submitted, at its end."""
    job = submit(engine, prompt, **more)
    await job.wait()
    return job


async def seen(job, kind):
    """The first event of a kind."""
    async for event in job.events():
        if event.kind == kind:
            return event
    raise AssertionError(f"`{job.state}` without `{kind}`")


async def heard(engine, name):
    """Wait for the engine to tell an observer of something; the facts."""
    future = asyncio.get_running_loop().create_future()

    def observe(told, **facts):
        if told == name and not future.done():
            future.set_result(facts)

    engine.on_event.append(observe)
    facts = await future
    engine.on_event.remove(observe)
    return facts


def kinds_of(job):
    return [event.kind for event in job._log]


def kill_worker(engine, number=signal.SIGKILL):
    os.kill(engine.status().workers[0].pid, number)


def let_go(path):
    """Have the worker that waits at a pipe go on."""
    with Path(path).open("wb", buffering=0) as pipe:
        pipe.write(b"x")


class Process:
    """A process that is watched from now on, whoever its parent is."""

    def __init__(self, pid):
        self._descriptor = os.pidfd_open(pid)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self._descriptor)

    def ends(self, timeout_s=30.0):
        """Whether it ends in time."""
        ready, _, _ = select.select([self._descriptor], [], [], timeout_s)
        return bool(ready)
