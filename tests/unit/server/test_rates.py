"""How much a key may ask for in a minute, and how long its requests may wait."""

import asyncio
import time
from types import SimpleNamespace

import pytest
from asgi_client import KEY, OTHER_KEY, bearer, error_of, open_client
from engines import make_spec
from server_fakes import FakeEngine

from flux_nf4.server.jobs import Job
from flux_nf4.server.problems import ApiError
from flux_nf4.server.rates import Rates
from flux_nf4.server.settings import ServeSettings

JOB = {"prompt": "a cat", "width": 64, "height": 64, "num_inference_steps": 1}


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which stands still unless it is set."""
    clock = SimpleNamespace(now_s=0.0)
    clock.monotonic = lambda: clock.now_s
    monkeypatch.setattr("flux_nf4.server.rates.time", clock)
    return clock


def num_passed(rates, settings, attempts, *, work=1.0, owner="alice"):
    passed = 0
    for _ in range(attempts):
        try:
            rates.take(settings, owner, work)
        except ApiError:
            return passed
        passed += 1
    return passed


def test_a_key_may_use_up_a_minute_at_once(clock):
    assert num_passed(Rates(), ServeSettings(max_rate=6), 100) == 6


def test_a_key_gets_its_rate_over_time(clock):
    rates, settings = Rates(), ServeSettings(max_rate=6)
    num_passed(rates, settings, 100)
    clock.now_s = 30.0

    assert num_passed(rates, settings, 100) == 3


def test_a_key_that_rests_saves_no_more_than_a_minute(clock):
    rates, settings = Rates(), ServeSettings(max_rate=6)
    num_passed(rates, settings, 1)
    clock.now_s = 3600.0

    assert num_passed(rates, settings, 100) == 6


def test_one_keys_requests_cost_another_nothing(clock):
    rates, settings = Rates(), ServeSettings(max_rate=2)
    num_passed(rates, settings, 100)

    assert num_passed(rates, settings, 100, owner="bob") == 2


def test_work_is_limited_as_well(clock):
    assert num_passed(Rates(), ServeSettings(max_work_rate=10), 100, work=5.0) == 2


def test_more_work_than_a_minutes_is_done_and_waited_for(clock):
    rates, settings = Rates(), ServeSettings(max_work_rate=10)
    rates.take(settings, "alice", 20.0)

    with pytest.raises(ApiError) as caught:
        rates.take(settings, "alice", 1.0)
    assert caught.value.headers["Retry-After"] == "66"


def test_a_refused_request_costs_nothing(clock):
    rates, settings = Rates(), ServeSettings(max_rate=6, max_work_rate=1)
    rates.take(settings, "alice", 1.0)
    num_passed(rates, settings, 1)
    clock.now_s = 60.0

    assert num_passed(rates, settings, 100, work=0.01) == 6


def answers(*keys, engine=None, **settings):
    """The answers to jobs of these keys, one after the other."""

    async def run():
        async with open_client(engine, api_keys=(KEY, OTHER_KEY), **settings) as client:
            return [await client.post("/v1/jobs", json=JOB, headers=bearer(key)) for key in keys]

    return asyncio.run(run())


def test_a_request_above_the_rate_is_told_when_to_come_back():
    last = answers(KEY, KEY, KEY, max_rate=2)[-1]

    assert last.status_code == 429
    assert error_of(last)["code"] == "rate_limit_exceeded"
    assert 1 <= int(last.headers["retry-after"]) <= 30


def test_another_key_is_served_meanwhile():
    assert [each.status_code for each in answers(KEY, KEY, OTHER_KEY, max_rate=1)] == [
        202,
        429,
        202,
    ]


def test_a_refused_request_is_counted():
    told = []
    engine = FakeEngine()
    engine.on_event.append(lambda name, **facts: told.append((name, facts.get("reason"))))
    answers(KEY, KEY, engine=engine, max_rate=1)

    assert ("rejected", "rate_limit") in told


def end_of_second_job(**settings):
    """The state and error of a job behind one that is held at its first step."""

    async def run():
        engine = FakeEngine()
        engine.hold()
        async with open_client(engine, **settings) as client:
            first, second = [(await client.post("/v1/jobs", json=JOB)).json() for _ in range(2)]
            text = (await client.get(f"/v1/jobs/{second['id']}/events")).text
            state = (await client.get(f"/v1/jobs/{first['id']}")).json()["state"]
            return state, engine.cancel_causes.get(second["id"]), text

    return asyncio.run(run())


def test_what_waits_too_long_is_given_up():
    _, cause, _ = end_of_second_job(queue_timeout_s=0.01)

    assert cause == "timeout"


def test_what_is_drawn_is_not_given_up():
    state, _, _ = end_of_second_job(queue_timeout_s=0.01)

    assert state == "running"


@pytest.mark.parametrize(("timeout_s", "cause"), [(30, "timeout"), (90, None)])
def test_what_waited_before_a_restart_has_waited(timeout_s, cause):
    job = Job(make_spec(), owner="", api="native", created_at=time.time() - 60)

    async def run():
        engine = FakeEngine()
        async with open_client(engine, queue_timeout_s=timeout_s):
            engine.take_up(job)
            await asyncio.sleep(0.05)
            return engine.cancel_causes.get(job.id)

    assert asyncio.run(run()) == cause
