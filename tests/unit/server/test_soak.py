"""The benchmark of the server, shortened: real engine, fake worker, mixed requests and faults."""

import asyncio
import contextlib
import os
import signal
import statistics
import sys

import httpx2
import pytest
from engines import FAKE_WORKER
from live_server import live_server
from server_fakes import wait_until

from benchmarks.server import hostile_bodies, post, timed_probes
from benchmarks.server_chaos import kill_under_load
from benchmarks.server_load import draw_alone, make_pictures, mixed_requests
from flux_nf4.server.engine import Engine, EngineSettings

PICTURES = make_pictures(16, seed=1)


class RealEngine(Engine):
    """Without levers."""

    def release(self):
        pass


@contextlib.contextmanager
def real_server(step_timeout_s=0.5, **settings):
    command = [sys.executable, str(FAKE_WORKER), "ready"]
    engine = RealEngine(EngineSettings(step_timeout_s=step_timeout_s), worker_command=command)
    with live_server(engine, **settings) as it:
        asyncio.run_coroutine_threadsafe(engine.wait_ready(), it.loop).result(20)
        yield it


@pytest.fixture
def server():
    with real_server() as it:
        yield it


def worker_of(server):
    return server.engine.status().workers[0].pid


@pytest.fixture
def alone(server):
    return asyncio.run(draw_alone(server.url, PICTURES))


def test_mixed_requests_are_neither_lost_nor_crossed(server, alone):
    tally = asyncio.run(mixed_requests(server.url, alone, requests=iter(range(120))))

    assert (tally.lost, tally.crossed) == ([], [])
    assert tally.num_images > 60


def test_mixed_requests_leave_nothing_behind(server, alone):
    asyncio.run(mixed_requests(server.url, alone, requests=iter(range(60))))

    def is_idle():
        status = server.engine.status()
        return (status.num_queued, status.num_running) == (0, 0)

    # The last of them may have been a client that went away in the middle of its image.
    wait_until(is_idle)
    assert is_idle()


def test_requests_outlive_their_workers(server):
    told = kill_under_load(
        server.url, lambda: worker_of(server), seconds=1.5, every_s=0.2, is_patient=True
    )

    assert told["faults"] == []
    assert told["num_kills"] >= 2


def test_a_request_outlives_a_worker_that_hangs(server, alone):
    os.kill(worker_of(server), signal.SIGSTOP)

    assert asyncio.run(draw_alone(server.url, PICTURES[:1])) == {PICTURES[0]: alone[PICTURES[0]]}


def test_the_server_is_alive_while_it_draws(server, alone):
    times, tally = timed_probes(
        server.url,
        lambda: asyncio.run(mixed_requests(server.url, alone, requests=iter(range(40)))),
    )

    assert tally.lost == []
    assert statistics.median(times) < 0.05


def test_hostile_bodies_are_refused(server):
    told = {name: post(server.url, *rest) for name, *rest in hostile_bodies(1_000_000)}

    assert {name: status for name, status in told.items() if status not in (400, 413)} == {}


def test_what_waits_for_too_long_is_a_503(pipe):
    with real_server(step_timeout_s=60, queue_timeout_s=0.05) as server:
        httpx2.post(f"{server.url}/v1/jobs", json={"prompt": f"hold {pipe}"})
        answer = httpx2.post(f"{server.url}/v1/images/generations", json={"prompt": "a"})

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "timeout")
