"""A real uvicorn at a free port: connections that misbehave, clients that leave, and the end."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import httpx2
import pytest
from live_server import live_server
from server_fakes import FakeEngine, wait_until

from flux_nf4.errors import FormatError, InputError
from flux_nf4.server.listening import bind, serve
from flux_nf4.server.settings import ServeSettings

GENERATIONS = "/v1/images/generations"
POST_HEAD = b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def read_to_end(connection):
    """Everything until the server closes; it is cut off if this returns."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


# ---- connections that misbehave -----------------------------------------------------------------


def test_a_refused_body_that_came_whole_is_answered_at_once_and_costs_no_connection():
    with live_server() as server, httpx2.Client(base_url=server.url) as client:
        body = b'{"prompt": [' + b"," * 11_000 + b"]}"
        answer = client.post("/v1/jobs", content=body, headers={"content-type": "application/json"})

        assert answer.status_code == 413
        assert "connection" not in answer.headers


@pytest.mark.parametrize("start", [b"", b"GET /livez HT", b"GET /livez HTTP/1.1\r\nHost: local"])
def test_headers_that_do_not_come_to_an_end_are_cut_off(start):
    with live_server(header_timeout_s=0.2) as server, connect(server) as connection:
        connection.sendall(start)

        assert read_to_end(connection) == b""


def test_headers_that_come_byte_by_byte_are_cut_off():
    with live_server(header_timeout_s=0.3) as server, connect(server) as connection:
        is_cut_off = threading.Event()
        dripping = threading.Thread(target=drip, args=(connection, is_cut_off))
        dripping.start()

        assert is_cut_off.wait(20)
        dripping.join()


def drip(connection, is_cut_off):
    """Send a byte whenever none came back for a moment, until the server has had enough."""
    connection.settimeout(0.02)
    try:
        while True:
            connection.sendall(b"G")
            with contextlib.suppress(TimeoutError):
                if not connection.recv(1):
                    break
    except ConnectionError:
        pass
    is_cut_off.set()


def test_headers_without_measure_are_refused():
    with live_server() as server, connect(server) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nX: ")
        try:
            for _ in range(100):
                connection.sendall(b"x" * 10_000)
            answer = read_to_end(connection)
        except ConnectionError:
            answer = b""

        assert answer[:12] in (b"", b"HTTP/1.1 400")


def test_a_body_that_stalls_is_cut_off():
    with live_server(body_timeout_s=0.2) as server, connect(server) as connection:
        connection.sendall(POST_HEAD + b"Content-Length: 100\r\n\r\n{")

        assert read_to_end(connection).startswith(b"HTTP/1.1 408")


def test_a_body_that_ends_before_its_length_makes_no_job():
    with live_server() as server:
        with connect(server) as connection:
            connection.sendall(POST_HEAD + b"Content-Length: 100\r\n\r\n{}")
        wait_until(lambda: httpx2.get(f"{server.url}/livez").status_code == 200)

        assert server.engine.jobs(owner="local") == []


def test_a_key_is_asked_for_before_the_body_is_taken():
    with live_server(api_keys=("k" * 20,)) as server, connect(server) as connection:
        head = POST_HEAD + b"Expect: 100-continue\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head)

        assert read_to_end(connection).startswith(b"HTTP/1.1 401")


def test_a_refused_upload_is_still_answered():
    with live_server(api_keys=("k" * 20,)) as server:
        answer = httpx2.post(
            f"{server.url}/v1/jobs",
            content=b" " * 5_000_000,
            headers={"content-type": "application/json"},
        )

        assert answer.status_code == 401


def test_several_requests_go_over_one_connection():
    with live_server() as server, httpx2.Client(base_url=server.url) as client:
        statuses = [client.get("/livez").status_code for _ in range(3)]
        statuses.append(client.get("/nothing").status_code)
        statuses.append(client.post("/v1/jobs", json={"prompt": "x"}).status_code)

    assert statuses == [200, 200, 200, 404, 202]


# ---- clients that leave -------------------------------------------------------------------------


def leave_while_it_draws(server, **body):
    """Ask for an image, see its first step, and hang up; the job."""
    server.pull(server.engine.hold)
    server.pull(server.engine.allow_steps, 1)
    with connect(server) as connection:
        text = json.dumps({"prompt": "a cat", **body})
        head = POST_HEAD.replace(b"/v1/jobs", GENERATIONS.encode())
        connection.sendall(head + f"Content-Length: {len(text)}\r\n\r\n{text}".encode())
        wait_until(lambda: server.engine.started_steps == 1)
    (job,) = server.engine.jobs(owner="local")
    wait_until(lambda: server.engine.cancel_causes.get(job.id))
    return job


@pytest.mark.parametrize("body", [{}, {"stream": True, "partial_images": 1}])
def test_a_client_that_leaves_stops_its_image_within_a_step(body):
    with live_server() as server:
        job = leave_while_it_draws(server, **body)
        server.pull(server.engine.allow_steps, 1)
        wait_until(lambda: job.is_finished)

        assert server.engine.cancel_causes[job.id] == "disconnect"
        assert job.state == "cancelled"
        assert server.engine.started_steps == 1


def test_a_job_goes_on_when_its_watcher_leaves():
    with live_server() as server, httpx2.Client(base_url=server.url) as client:
        server.pull(server.engine.hold)
        job_id = client.post("/v1/jobs", json={"prompt": "a cat"}).json()["id"]
        with client.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
            next(stream.iter_lines())
        server.pull(server.engine.release)
        wait_until(lambda: client.get(f"/v1/jobs/{job_id}").json()["state"] == "done")

        assert server.engine.cancel_causes == {}


def test_a_quiet_stream_is_kept_open_by_comments():
    with live_server(keep_alive_s=0.05) as server, httpx2.Client(base_url=server.url) as client:
        server.pull(server.engine.hold)
        job_id = client.post("/v1/jobs", json={"prompt": "a cat"}).json()["id"]
        with client.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
            assert ": keep-alive" in stream.iter_lines()


def test_a_reader_that_stops_reading_holds_nobody_up():
    with live_server() as server, connect(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = {"prompt": "x", "num_inference_steps": 300, "num_previews": 300, "width": 1024}
        job = httpx2.post(f"{server.url}/v1/jobs", json=body).json()
        head = f"GET /v1/jobs/{job['id']}/events HTTP/1.1\r\nHost: localhost\r\n\r\n"
        connection.sendall(head.encode())
        url = f"{server.url}/v1/jobs/{job['id']}"

        wait_until(lambda: httpx2.get(url).json()["state"] == "done", 60)
        assert httpx2.get(url).json()["error"] is None


# ---- listening ----------------------------------------------------------------------------------


def test_a_port_in_use_is_told():
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of `127.0.0.1` is in use"):
            bind("127.0.0.1", port)


def test_a_host_that_is_not_this_machine_is_told():
    with pytest.raises(InputError, match=r"192\.0\.2\.1"):
        bind("192.0.2.1", 0)


def test_a_model_that_cannot_be_loaded_ends_it_with_the_reason():
    engine = FakeEngine()
    engine.load_error = FormatError("`x.safetensors` is damaged")
    with bind("127.0.0.1", 0) as listener, pytest.raises(FormatError, match="damaged"):
        asyncio.run(serve(ServeSettings(), engine, listener))


# ---- the end ------------------------------------------------------------------------------------

PROGRAM = """
import asyncio, sys
from server_fakes import FakeEngine
from flux_nf4.server.listening import bind, serve
from flux_nf4.server.settings import ServeSettings

step_s, drain_timeout_s = map(float, sys.argv[1:])
listener = bind("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
settings = ServeSettings(drain_timeout_s=drain_timeout_s)
cut_short_by = asyncio.run(
    serve(
        settings,
        FakeEngine(step_s=step_s),
        listener,
        on_ready=lambda: print("ready", flush=True),
        on_stopping=lambda: print("stopping", flush=True),
    )
)
print(f"cut short by {cut_short_by}", flush=True)
"""


class Served:
    """The program above in a process of its own, which draws an image for a client."""

    def __init__(self, step_s, drain_timeout_s):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(step_s), str(drain_timeout_s)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.url = f"http://127.0.0.1:{self.line()}"
        assert self.line() == "ready"
        self.answer = None
        self.client = threading.Thread(target=self._ask)
        self.client.start()
        wait_until(lambda: httpx2.get(f"{self.url}/readyz").json()["num_running"] == 1)

    def _ask(self):
        try:
            self.answer = httpx2.post(
                f"{self.url}{GENERATIONS}", json={"prompt": "x", "quality": "low"}, timeout=60
            )
        except httpx2.TransportError as error:
            self.answer = error

    def line(self):
        return self.process.stdout.readline().strip()

    def end(self):
        """The last line, once it is over."""
        self.client.join()
        said = self.process.communicate(timeout=30)[0].strip().splitlines()
        assert self.process.returncode == 0
        return said[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_was_begun_come_to_its_end(number):
    served = Served(step_s=0.1, drain_timeout_s=60)
    served.process.send_signal(number)
    assert served.line() == "stopping"
    while_stopping = httpx2.get(f"{served.url}/readyz").status_code
    refused = httpx2.post(f"{served.url}/v1/jobs", json={"prompt": "x"})

    assert served.end() == "cut short by None"
    assert served.answer.status_code == 200
    assert while_stopping == 503
    assert refused.headers["x-should-retry"] == "false"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_second_signal_stops_at_once():
    served = Served(step_s=1000, drain_timeout_s=1000)
    served.process.send_signal(signal.SIGTERM)
    assert served.line() == "stopping"
    served.process.send_signal(signal.SIGTERM)

    assert served.end() == "cut short by 15"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_what_takes_too_long_to_finish_is_told_so():
    served = Served(step_s=1000, drain_timeout_s=0.1)
    served.process.send_signal(signal.SIGTERM)

    assert served.end() == "cut short by None"
    assert served.answer.status_code == 503
    assert served.answer.json()["error"]["code"] == "shutdown"
