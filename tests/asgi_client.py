"""Requests to the application without a network: one, or a few in one event loop."""

from __future__ import annotations

import asyncio
import contextlib

import httpx2
from server_fakes import FakeEngine

from flux_nf4.server.app import build_app
from flux_nf4.server.settings import ServeSettings

KEY, OTHER_KEY = "key-of-alice-0123456789", "key-of-bob-0123456789"


def bearer(key=KEY):
    return {"authorization": f"Bearer {key}"}


@contextlib.asynccontextmanager
async def open_client(engine=None, **settings):
    """A client of an application whose engine runs."""
    engine = engine or FakeEngine()
    app = build_app(ServeSettings(**settings), engine)
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    await engine.start()
    try:
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            client.engine = engine
            yield client
    finally:
        engine.release()
        await engine.stop()


def ask(method, path, *, engine=None, settings=None, **request):
    """The answer to one request."""

    async def run():
        async with open_client(engine, **(settings or {})) as client:
            return await client.request(method, path, **request)

    return asyncio.run(run())


def finished_job(job, *, engine=None, settings=None):
    """A submitted job's last state, and its events as text."""

    async def run():
        async with open_client(engine, **(settings or {})) as client:
            answer = await client.post("/v1/jobs", json=job)
            assert answer.status_code == 202, answer.text
            url = f"/v1/jobs/{answer.json()['id']}"
            events = (await client.get(f"{url}/events")).text
            return (await client.get(url)).json(), events

    return asyncio.run(run())


def error_of(answer):
    """The error in an answer, which must have OpenAI's shape."""
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]
