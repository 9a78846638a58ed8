"""The memory setting: what may be asked, who may ask, and what the workers do about it."""

import asyncio
import contextlib
import dataclasses

import httpx2
import pytest
from asgi_client import KEY, OTHER_KEY, ask, bearer, error_of, open_client
from engines import finished, heard, kill_worker, let_go, seen, serving, submit
from server_fakes import FakeEngine, FakeSupervisor, fake_memory, planned_engine

from flux_nf4.errors import DoesNotFitError
from flux_nf4.server.app import build_app
from flux_nf4.server.jobs import NotReadyError
from flux_nf4.server.settings import ServeSettings

GB = 2**30


def put(vram, engine=None, *, headers=None, **settings):
    engine = engine or planned_engine()
    body = {"vram": vram}
    return ask(
        "PUT", "/v1/memory", engine=engine, settings=settings, json=body, headers=headers or {}
    )


@contextlib.asynccontextmanager
async def real(start="planned", **settings):
    """An engine before fake workers, and a client of its application."""
    async with serving(start, **settings) as engine:
        await engine.wait_ready()
        transport = httpx2.ASGITransport(app=build_app(ServeSettings(), engine))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield engine, lambda vram: client.put("/v1/memory", json={"vram": vram})


# ---- what may be asked --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vram", "num_bytes"),
    [("6GB", 6 * GB), (" 6 gib", 6 * GB), ("6144MB", 6 * GB), ("auto", None), (None, None)],
)
def test_an_amount_as_people_write_it_reaches_every_worker(vram, num_bytes):
    engine = planned_engine(num_workers=2)

    assert put(vram, engine).json() == fake_memory(num_bytes)
    assert [worker.budgets for worker in engine.supervisors] == [[num_bytes], [num_bytes]]


@pytest.mark.parametrize("vram", ["", "6", "six", "-6GB", "6GB of it", "0GB", 6, True, [], {}])
def test_what_is_no_amount_is_a_400_that_names_the_field(vram):
    answer = put(vram)

    assert (answer.status_code, error_of(answer)["param"]) == (400, "vram")


def test_the_new_plan_is_told_from_then_on():
    async def claim():
        async with open_client(planned_engine()) as client:
            await client.put("/v1/memory", json={"vram": "6GB"})
            told = (await client.get("/v1/capabilities")).json()
            assert told["memory"] == fake_memory(6 * GB)

    asyncio.run(claim())


def test_what_does_not_fit_is_a_400_that_says_what_would():
    engine = planned_engine()
    engine.supervisors[0].fault = DoesNotFitError("it needs 2,100 MiB", hint="allow 2100MiB")

    answer = put("2GB", engine)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "does_not_fit")
    assert error_of(answer)["message"] == "it needs 2,100 MiB; allow 2100MiB"


def test_where_one_worker_cannot_all_keep_what_they_had():
    engine = planned_engine(num_workers=2)
    engine.supervisors[1].fault = NotReadyError("the worker was lost")

    answer = put("4GB", engine)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert [worker.budgets for worker in engine.supervisors] == [[4 * GB, None], []]
    assert engine.capabilities.memory == fake_memory(None)


def test_without_a_plan_there_is_nothing_to_set():
    engine = FakeEngine()
    engine.supervisors = [FakeSupervisor()]

    answer = put("6GB", engine)
    assert (answer.status_code, error_of(answer)["code"]) == (409, "memory_not_planned")


def test_replicas_of_a_cluster_are_told_only_at_their_start():
    engine = planned_engine(num_workers=0)

    assert put("6GB", engine).status_code == 409
    assert not ask("GET", "/v1/capabilities", engine=engine).json()["features"]["memory_setting"]


# ---- who may ask --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({}, 200),
        ({"api_keys": (KEY,)}, 200),
        ({"api_keys": (KEY,), "host": "0.0.0.0"}, 200),
        ({"api_keys": (KEY, OTHER_KEY)}, 403),
        ({"insecure": True, "host": "0.0.0.0"}, 403),
        ({"lock_memory": True}, 403),
        ({"api_keys": (KEY,), "lock_memory": True}, 403),
    ],
)
def test_only_who_is_alone_on_the_server_may_set_its_memory(settings, status):
    answer = put("6GB", headers=bearer(), **settings)
    told = ask(
        "GET", "/v1/capabilities", engine=planned_engine(), settings=settings, headers=bearer()
    )

    assert answer.status_code == status
    assert told.json()["features"]["memory_setting"] == (status == 200)


# ---- what the workers do ------------------------------------------------------------------------


def test_a_worker_answers_while_it_draws(pipe):
    async def claim():
        async with real() as (engine, put):
            job = submit(engine, f"hold {pipe}")
            await seen(job, "step")
            assert (await put("6GB")).json()["device_bytes"] == 6 * GB
            let_go(pipe)
            await job.wait()
            assert job.state == "done"

    asyncio.run(claim())


def test_a_budget_outlives_its_worker():
    async def claim():
        async with real() as (engine, put):
            await put("6GB")
            kill_worker(engine)
            await heard(engine, "worker_restarted")
            await finished(engine)
            assert engine.capabilities.memory["vram"] == 6 * GB

    asyncio.run(claim())


def test_a_budget_that_does_not_fit_is_forgotten_with_its_answer():
    async def claim():
        async with real() as (engine, put):
            before = engine.capabilities
            answer = await put("512MB")
            assert error_of(answer)["code"] == "does_not_fit"
            kill_worker(engine)
            await finished(engine)
            assert engine.capabilities == before

    asyncio.run(claim())


def test_a_worker_that_dies_of_the_question_is_replaced_and_has_what_it_had():
    async def claim():
        async with real() as (engine, put):
            answer = await put("0.001KB")  # 1 byte
            assert (answer.status_code, error_of(answer)["code"]) == (503, "not_ready")
            assert (await finished(engine)).state == "done"
            assert engine.capabilities.memory["vram"] is None

    asyncio.run(claim())


def test_a_worker_on_its_way_is_not_asked():
    async def claim():
        async with real() as (engine, put):
            engine.supervisors[0].state = "restarting"
            assert (await put("6GB")).status_code == 503

    asyncio.run(claim())


def test_all_devices_are_given_the_budget():
    async def claim():
        async with real(device="all") as (engine, put):
            await asyncio.gather(*(finished(engine) for _ in range(3)))
            while any(worker.state != "idle" for worker in engine.supervisors):
                await asyncio.sleep(0)
            await put("6GB")
            kept = [worker._settings.vram for worker in engine.supervisors]
            assert kept == [6 * GB] * 3
            assert engine.settings == dataclasses.replace(engine.settings, vram=6 * GB)

    asyncio.run(claim())
