import asyncio
import io
import json
import logging

import httpx2
import pytest
from live_server import live_server
from server_fakes import wait_until

from flux_nf4.server import logs

KEY = "s3cret-key-of-some-length"
PROMPT = "a very private lighthouse"


@pytest.fixture
def lines(monkeypatch):
    """All log lines of this process, as they are written; and logging as it was, afterwards."""
    root = logging.getLogger()
    names = ("", "flux_nf4", "uvicorn")
    levels = {name: logging.getLogger(name).level for name in names}
    handlers = root.handlers
    stream = io.StringIO()

    def written():
        return stream.getvalue().splitlines()

    def configure(form, **more):
        logs.configure(form, **more)
        root.handlers[0].setStream(stream)
        return written

    yield configure
    root.handlers = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def told(lines, path):
    """The line about a request to `path`, once it is there."""
    wait_until(lambda: any(path in line for line in lines()))
    return json.loads(next(line for line in lines() if f'"path": "{path}"' in line))


def test_a_request_is_one_line_with_its_id(lines):
    written = lines("json")
    with live_server() as live:
        headers = {"x-request-id": "my-id-7"}
        httpx2.get(f"{live.url}/v1/capabilities", headers=headers)
        line = told(written, "/v1/capabilities")

    assert line["request_id"] == "my-id-7"
    assert (line["method"], line["status"], line["level"]) == ("GET", 200, "info")
    assert line["duration_ms"] >= 0
    assert line["bytes"] > 100


def test_a_refused_request_is_told_too(lines):
    written = lines("json")
    with live_server(api_keys=(KEY,)) as live:
        httpx2.get(f"{live.url}/v1/jobs")

        assert told(written, "/v1/jobs")["status"] == 401


def test_a_job_is_told_without_its_prompt(lines):
    written = lines("json")
    with live_server() as live:
        httpx2.post(f"{live.url}/v1/jobs", json={"prompt": PROMPT, "num_inference_steps": 1})
        told(written, "/v1/jobs")
    job = json.loads(next(line for line in written() if "job accepted" in line))

    assert (job["width"], job["steps"], job["api"]) == (64, 1, "jobs")
    assert job["request_id"]
    assert "lighthouse" not in "".join(written())


def test_prompts_are_told_where_the_operator_wants_them(lines):
    written = lines("json")
    with live_server(log_prompts=True) as live:
        httpx2.post(f"{live.url}/v1/jobs", json={"prompt": PROMPT, "num_inference_steps": 1})
    job = json.loads(next(line for line in written() if "job accepted" in line))

    assert job["prompt"] == PROMPT


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_key_is_never_told(lines, form):
    written = lines(form, secrets=(KEY,))
    with live_server(api_keys=(KEY,)) as live:
        client = httpx2.Client(base_url=live.url)
        client.get("/v1/jobs", headers={"authorization": f"Bearer {KEY}"}, params={"key": KEY})
        client.get(f"/{KEY}")
        client.close()
        wait_until(lambda: len(written()) >= 2)
    logging.getLogger("flux_nf4").error("the key %s was seen", KEY)

    assert KEY not in "".join(written())
    assert "the key [key] was seen" in "".join(written())


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
def test_probes_are_silent_while_all_is_well(lines, path):
    written = lines("json")
    with live_server() as live:
        httpx2.get(live.url + path)
        httpx2.get(f"{live.url}/v1/capabilities")
        told(written, "/v1/capabilities")

    assert not any(path in line for line in written())


def test_a_probe_that_says_no_is_told(lines):
    written = lines("json")
    with live_server() as live:
        live.engine.reason = "the model is loading"
        httpx2.get(f"{live.url}/readyz")
        line = told(written, "/readyz")

    assert (line["status"], line["level"]) == (503, "warning")


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_path_with_a_line_break_stays_one_line(lines, form):
    written = lines(form)
    asyncio.run(ended("/a\nERROR forged"))

    assert len(written()) == 1
    assert "/a%0AERROR%20forged" in written()[0]


def test_a_client_that_left_is_told_as_499(lines):
    written = lines("json")
    asyncio.run(ended("/a"))

    assert json.loads(written()[0])["status"] == 499


async def ended(path):
    """A request that ends without an answer."""

    async def app(scope, receive, send):
        return

    scope = {"type": "http", "method": "GET", "path": path, "client": ("::1", 1)}
    await logs.AccessLog(app)(scope, None, None)


def test_text_is_for_people(lines):
    written = lines("text")
    with live_server() as live:
        httpx2.get(f"{live.url}/v1/capabilities")
        wait_until(written)
    words = written()[0].split()

    assert words[1:5] == ["info", "GET", "/v1/capabilities", "200"]


@pytest.mark.parametrize("form", ["json", "text"])
def test_an_exception_comes_with_its_trace(lines, form):
    written = lines(form)
    try:
        int("a bug")
    except ValueError:
        logging.getLogger("flux_nf4").exception("it broke")

    assert "Traceback" in "\n".join(written())
    assert len(written()) == 1 or form == "text"
