"""Faults on purpose: workers killed and stopped, a parent killed, a restart with work waiting."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.server_load import LostError, draw, draw_alone, follow, make_pictures, open_client
from benchmarks.server_process import is_running, running_server, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.server_load import Picture

CHAOS_S = 180.0
KILL_EVERY_S = 5.0
NUM_CLIENTS = 4
STEP_TIMEOUT_S = 2
_CLEAR_ERROR = "what drew it was lost each time"


@dataclass
class Ends:
    """When requests got their images, and how all of them ended."""

    image_times: list[float] = field(default_factory=list)
    num_clear_errors: int = 0
    faults: list[str] = field(default_factory=list)


async def keep_asking(
    url: str, alone: dict[Picture, list[str]], ends: Ends, is_over: Callable[[], bool]
) -> None:
    """Requests one after the other from each of a few clients until it is over."""
    pictures = list(alone)

    async def one_client(place: int) -> None:
        async with open_client(url) as client:
            while not is_over():
                picture = pictures[place % len(pictures)]
                place += 1
                try:
                    if await draw(client, picture) != alone[picture]:
                        ends.faults.append(f"crossed: {picture}")
                    ends.image_times.append(time.monotonic())
                except LostError as error:
                    if _CLEAR_ERROR in str(error):
                        ends.num_clear_errors += 1
                    else:
                        ends.faults.append(f"lost: {picture}: {error}")

    await asyncio.gather(*(one_client(3 * number) for number in range(NUM_CLIENTS)))


def kill_under_load(
    url: str,
    find_worker: Callable[[], int | None],
    *,
    seconds: float,
    every_s: float,
    is_patient: bool,
) -> dict[str, Any]:
    """Kill the worker with SIGKILL again and again while clients ask; what became of it all.

    If it is patient, a worker is killed `every_s` after it brought an image, else whatever it does
    then, even if it is still loading its model.
    """
    alone = asyncio.run(draw_alone(url, make_pictures(12, seed=2)))
    ends, is_over, kills = Ends(), threading.Event(), list[float]()
    asking = threading.Thread(
        target=lambda: asyncio.run(keep_asking(url, alone, ends, is_over.is_set))
    )
    asking.start()
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        time.sleep(every_s)
        pid = find_worker()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                kills.append(time.monotonic())
        if is_patient and kills:
            until(lambda: ends.image_times and ends.image_times[-1] > kills[-1])
    until(lambda: ends.image_times and ends.image_times[-1] > kills[-1])
    is_over.set()
    asking.join()
    recoveries = [min(each for each in ends.image_times if each > kill) - kill for kill in kills]
    return {
        "seconds": seconds,
        "kill_every_s": every_s,
        "num_kills": len(kills),
        "num_done": len(ends.image_times),
        "num_clear_errors": ends.num_clear_errors,
        "num_lost_or_crossed": len(ends.faults),
        "recovery_median_s": round(statistics.median(recoveries), 2),
        "recovery_max_s": round(max(recoveries), 2),
        "faults": ends.faults[:5],
    }


def chaos() -> dict[str, Any]:
    """A worker killed five seconds after each time that it brought an image again."""
    return _kill_workers(is_patient=True)


def storm() -> dict[str, Any]:
    """A worker killed every five seconds, which hardly leaves it the time to load its model."""
    return _kill_workers(is_patient=False)


def _kill_workers(*, is_patient: bool) -> dict[str, Any]:
    with running_server() as server:
        return kill_under_load(
            server.url,
            lambda: server.worker_pid,
            seconds=CHAOS_S,
            every_s=KILL_EVERY_S,
            is_patient=is_patient,
        )


def faults() -> dict[str, Any]:
    """A worker that hangs, a parent that is killed, and a restart with jobs in the queue."""
    return {"hang": _hang(), "orphan": _orphan(), "durable": _durable()}


def _hang() -> dict[str, Any]:
    """A worker stopped while it draws: its job ends in its image all the same."""
    picture = make_pictures(1, seed=3)[0]
    with running_server("--step-timeout", str(STEP_TIMEOUT_S)) as server:
        alone = asyncio.run(draw_alone(server.url, [picture]))
        pid = server.worker_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        began_s = time.perf_counter()
        again = asyncio.run(draw_alone(server.url, [picture]))
        return {
            "step_timeout_s": STEP_TIMEOUT_S,
            "seconds_to_image": round(time.perf_counter() - began_s, 2),
            "is_same_image": again == alone,
            "is_worker_gone": not is_running(pid),
        }


def _orphan() -> dict[str, Any]:
    """A parent killed while its worker draws: the worker ends too."""
    with running_server() as server:
        pid = server.worker_pid
        assert pid is not None
        asyncio.run(submit(server.url, make_pictures(4, seed=4)))
        server.process.kill()
        return {"seconds_to_end_of_worker": round(until(lambda: not is_running(pid)), 3)}


def _durable() -> dict[str, Any]:
    """A parent killed with six jobs: the next one has them all, and draws the same images."""
    pictures = [each for each in make_pictures(24, seed=5) if each.api == "jobs"]
    with tempfile.TemporaryDirectory() as folder:
        journal = ("--durable", f"{folder}/journal")
        with running_server(*journal) as server:
            alone = asyncio.run(draw_alone(server.url, pictures))
            jobs = asyncio.run(submit(server.url, pictures))
            server.process.kill()
        with running_server(*journal) as server:
            found = asyncio.run(fetch(server.url, jobs))
    is_same = [hashes == alone[picture] for hashes, picture in zip(found, pictures, strict=True)]
    return {"num_jobs": len(jobs), "num_done_after_restart": sum(is_same)}


async def submit(url: str, pictures: list[Picture]) -> list[dict[str, Any]]:
    """Jobs for pictures, not waited for."""
    async with open_client(url) as client:
        return [
            json.loads((await client.post("/v1/jobs", json=each.as_job())).text)
            for each in pictures
        ]


async def fetch(url: str, jobs: list[dict[str, Any]]) -> list[list[str]]:
    """The hashes of the jobs' images, when they are there."""
    async with open_client(url) as client:
        return [await follow(client, job) for job in jobs]
