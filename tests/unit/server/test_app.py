import asyncio
import re

import pytest
from asgi_client import KEY, ask, bearer, error_of, open_client
from server_fakes import FakeEngine

from flux_nf4.errors import DiskError, DoesNotFitError, NumericalError
from flux_nf4.server.app import build_app
from flux_nf4.server.settings import ServeSettings

# ---- errors -------------------------------------------------------------------------------------


def test_an_unknown_route_is_a_404_in_openais_shape():
    answer = ask("GET", "/v1/no-such-thing")

    assert answer.status_code == 404
    assert error_of(answer)["code"] == "not_found"


def test_a_wrong_method_is_a_405_in_openais_shape():
    answer = ask("PUT", "/v1/jobs")

    assert answer.status_code == 405
    assert error_of(answer)["code"] == "method_not_allowed"
    assert "POST" in answer.headers["allow"]


class BrokenEngine(FakeEngine):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def submit(self, spec, *, owner, api):
        raise self.error


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RuntimeError("secret detail"), 500, "internal_error"),
        (DiskError("no space left"), 507, "disk_full"),
        (NumericalError("NaN in the text stage"), 500, "internal_error"),
        (DoesNotFitError("2 GB more were needed"), 503, "out_of_memory"),
    ],
)
def test_a_fault_is_answered_in_openais_shape(error, status, code):
    answer = ask("POST", "/v1/jobs", json={"prompt": "a cat"}, engine=BrokenEngine(error))

    assert answer.status_code == status
    assert error_of(answer)["code"] == code
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "x-request-id" in answer.headers


def test_a_fault_tells_the_client_no_details():
    answer = ask(
        "POST", "/v1/jobs", json={"prompt": "x"}, engine=BrokenEngine(RuntimeError("secret"))
    )

    assert "secret" not in answer.text


@pytest.mark.parametrize(
    "body",
    [b"{", b"", b"[]", b'"prompt"', b"\xff\xfe", b"[" * 9_000, b'{"prompt": 1e999}', b"null"],
)
def test_a_body_that_is_no_request_is_a_400(body):
    answer = ask("POST", "/v1/jobs", content=body, headers={"content-type": "application/json"})

    assert answer.status_code == 400
    assert error_of(answer)["type"] == "invalid_request_error"


def test_half_of_a_surrogate_pair_can_be_quoted_back():
    answer = ask(
        "POST",
        "/v1/jobs",
        content=rb'{"prompt": "a cat", "schedule": "\ud800"}',
        headers={"content-type": "application/json"},
    )

    assert error_of(answer)["param"] == "schedule"


# ---- request ids --------------------------------------------------------------------------------


def test_every_answer_has_a_request_id_of_its_own():
    ids = {ask("GET", path).headers["x-request-id"] for path in ("/livez", "/nothing")}

    assert len(ids) == 2


def test_a_request_id_that_is_sent_comes_back():
    assert (
        ask("GET", "/livez", headers={"x-request-id": "a.b-1"}).headers["x-request-id"] == "a.b-1"
    )


def test_a_request_id_that_is_no_id_is_replaced():
    sent = "x" * 65

    assert ask("GET", "/livez", headers={"x-request-id": sent}).headers["x-request-id"] != sent


# ---- health -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/startupz"])
def test_health_needs_no_key(path):
    assert ask("GET", path, settings={"api_keys": (KEY,)}).status_code == 200


def test_an_engine_that_cannot_draw_is_alive_but_not_ready():
    engine = FakeEngine()
    engine.reason = "the worker fails to start"

    assert ask("GET", "/livez", engine=engine).status_code == 200
    ready = ask("GET", "/readyz", engine=engine)
    assert ready.status_code == 503
    assert ready.json()["reason"] == "the worker fails to start"


def loading_engine():
    engine = FakeEngine()
    engine.capabilities, engine.reason = None, "the model is loading"
    return engine


def test_while_the_model_loads_start_up_tells_of_the_workers():
    answer = ask("GET", "/startupz", engine=loading_engine())

    assert answer.status_code == 503
    assert answer.json()["workers"][0]["device"] == "cpu"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/capabilities"])
def test_while_the_model_loads_clients_are_told_to_come_back(path):
    answer = ask("GET", path, engine=loading_engine())

    assert answer.status_code == 503
    assert error_of(answer)["code"] == "model_loading"
    assert int(answer.headers["retry-after"]) > 0


def test_while_it_drains_it_is_not_ready_and_takes_nothing_new():
    async def run():
        async with open_client() as client:
            await client.engine.drain(0)
            job = await client.post("/v1/jobs", json={"prompt": "a cat"})
            return await client.get("/readyz"), job

    ready, job = asyncio.run(run())
    assert ready.status_code == 503
    assert job.status_code == 503
    assert job.headers["x-should-retry"] == "false"
    assert error_of(job)["code"] == "draining"


# ---- descriptions -------------------------------------------------------------------------------


def test_the_docs_load_nothing_at_all():
    page = ask("GET", "/docs")

    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"<script|<link|<img|<iframe|src=|https?://", page.text)


def test_every_described_route_is_in_the_docs():
    page = ask("GET", "/docs").text
    described = build_app(ServeSettings(), FakeEngine()).openapi()["paths"]

    assert "/v1/images/generations" in described
    assert [path for path in described if path not in page] == []


def test_no_route_answers_422():
    described = build_app(ServeSettings(), FakeEngine()).openapi()["paths"]
    codes = {
        code for path in described.values() for each in path.values() for code in each["responses"]
    }

    assert "422" not in codes
    assert "default" in codes


def test_the_description_needs_a_key_where_there_is_one():
    settings = {"api_keys": (KEY,)}

    assert ask("GET", "/openapi.json", settings=settings).status_code == 401
    assert ask("GET", "/openapi.json", settings=settings, headers=bearer()).status_code == 200
