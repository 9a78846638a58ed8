"""What `flux-nf4 serve` costs, and what it withstands, with the demo model on a CPU.

    taskset -c 0,1 env OMP_NUM_THREADS=1 python -m benchmarks.server overhead
    ... livez | hostile | soak | chaos | storm | faults | all

Each writes `benchmarks/results/server-NAME.json`; docs/server-figures.md shows them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import http.client
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from benchmarks import server_chaos
from benchmarks.server_load import draw_alone, make_pictures, mixed_requests
from benchmarks.server_process import machine, rss_mb, running_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.server_load import Tally

RESULTS = Path(__file__).parent / "results"
SHAPES = ((64, 1, 60), (256, 4, 30))  # size, steps, turns
WARM_UP_TURNS = 5
NUM_REQUESTS = 2000  # the first half fills the history of jobs, which is bounded
SAMPLE_EVERY = 25  # images between two looks at the memory
LIVEZ_S = 20.0
HOSTILE_TURNS = 7

# What a worker does, without a server: one request a line, the seconds of each a line.
_DIRECT = """
import json, sys, time
from flux_nf4.pipeline.generate import generate
from flux_nf4.pipeline.load import LoadSettings, load_model
from flux_nf4.pipeline.request import GenerationRequest

model = load_model(None, LoadSettings(device="cpu"))
for line in sys.stdin:
    began_s = time.perf_counter()
    for event in generate(model, GenerationRequest(**json.loads(line))):
        pass
    print(time.perf_counter() - began_s, flush=True)
"""


class Caller:
    """Requests on one open connection, by the standard library's client."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=300)

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        """The answer's body, read to its end."""
        headers = {} if body is None else {"Content-Type": "application/json"}
        content = None if body is None else json.dumps(body)
        self._connection.request(method, path, content, headers)
        answer = self._connection.getresponse()
        data = answer.read()
        assert answer.status < 300, data
        return data


def spread_ms(seconds: list[float]) -> dict[str, float]:
    """Median, the middle 60 % and the extremes of some times, in ms."""
    low, *_, high = statistics.quantiles(seconds, n=5)
    values = {"median": statistics.median(seconds), "p20": low, "p80": high, "max": max(seconds)}
    return {name: round(1000 * value, 2) for name, value in values.items()}


# ---- overhead -------------------------------------------------------------------------------


def overhead() -> dict[str, Any]:
    """What a request takes through each API beyond the pipeline alone, in turns with it."""
    command = [sys.executable, "-c", _DIRECT]
    direct = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    rows = []
    with direct, running_server() as server:
        caller = Caller(server.url)
        for size, num_steps, num_turns in SHAPES:
            turns = [
                _one_turn(direct, caller, size, num_steps, seed)
                for seed in range(num_turns + WARM_UP_TURNS)
            ][WARM_UP_TURNS:]
            row: dict[str, Any] = {"size": size, "num_steps": num_steps, "num_turns": num_turns}
            row["pipeline_ms"] = spread_ms([turn["pipeline"] for turn in turns])
            for api in ("native", "openai"):
                row[f"{api}_ms"] = spread_ms([turn[api] for turn in turns])
                row[f"{api}_added_ms"] = spread_ms([turn[api] - turn["pipeline"] for turn in turns])
            rows.append(row)
        assert direct.stdin is not None
        direct.stdin.close()
    return {"rows": rows}


def _one_turn(
    direct: subprocess.Popen[str], caller: Caller, size: int, num_steps: int, seed: int
) -> dict[str, float]:
    request = {
        "prompt": "a red apple",
        "width": size,
        "height": size,
        "num_inference_steps": num_steps,
        "seed": seed,
    }

    def draw_directly() -> float:
        assert direct.stdin is not None
        assert direct.stdout is not None
        direct.stdin.write(json.dumps(request) + "\n")
        direct.stdin.flush()
        return float(direct.stdout.readline())

    # Each twice, and the second counts: the first finds the caches full of another process.
    draw_directly()
    seconds = {"pipeline": draw_directly()}
    for api, ask in (("native", _ask_native), ("openai", _ask_openai)):
        ask(caller, request)
        began_s = time.perf_counter()
        ask(caller, request)
        seconds[api] = time.perf_counter() - began_s
    return seconds


def _ask_native(caller: Caller, request: dict[str, Any]) -> None:
    """Submit, follow the events to the end, fetch the image."""
    job = json.loads(caller.ask("POST", "/v1/jobs", request))
    caller.ask("GET", f"/v1/jobs/{job['id']}/events")
    assert caller.ask("GET", f"/v1/jobs/{job['id']}/images/0.png")[:4] == b"\x89PNG"


def _ask_openai(caller: Caller, request: dict[str, Any]) -> None:
    answer = json.loads(caller.ask("POST", "/v1/images/generations", request))
    assert answer["data"][0]["b64_json"]


# ---- livez ----------------------------------------------------------------------------------


def livez() -> dict[str, Any]:
    """How fast `/livez` answers while the worker draws and clients ask for images."""
    with running_server() as server:
        alone = asyncio.run(draw_alone(server.url, make_pictures(16, seed=1)))
        load = {"clients": 4, "seconds": LIVEZ_S}
        times, tally = timed_probes(
            server.url, lambda: asyncio.run(_load_for(server.url, alone, LIVEZ_S))
        )
    return load | {"num_probes": len(times), "num_images": tally.num_images, **_percentiles(times)}


async def _load_for(url: str, alone: Any, seconds: float) -> Tally:
    ends_at = time.monotonic() + seconds
    in_time = itertools.takewhile(lambda _: time.monotonic() < ends_at, itertools.count())
    return await mixed_requests(url, alone, num_clients=4, requests=in_time)


def timed_probes(url: str, load: Callable[[], Any]) -> tuple[list[float], Any]:
    """The seconds of each `/livez`, a hundred a second while `load` goes on; what it returned."""
    results: list[Any] = []
    loading = threading.Thread(target=lambda: results.append(load()))
    loading.start()
    times = []
    with contextlib.closing(Caller(url)) as caller:
        while loading.is_alive():
            began_s = time.perf_counter()
            caller.ask("GET", "/livez")
            times.append(time.perf_counter() - began_s)
            time.sleep(0.01)
    return times, results[0]


def _percentiles(times: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=1000)
    values = {"p50_ms": cuts[499], "p99_ms": cuts[989], "p999_ms": cuts[998], "max_ms": max(times)}
    return {name: round(1000 * value, 2) for name, value in values.items()}


# ---- hostile bodies -------------------------------------------------------------------------

_FORM = {"Content-Type": "multipart/form-data; boundary=b"}
_MEGA = 1_000_000


def hostile_bodies(num_bytes: int) -> Iterator[tuple[str, str, bytes, dict[str, str]]]:
    """Name, path, body and headers of requests that are all work and no meaning."""
    many = num_bytes // 12
    bodies = {
        "array of numbers": b"[" + b"1," * (num_bytes // 2) + b"1]",
        "nested arrays": b"[" * num_bytes,
        "unknown fields": b'{"prompt":"a"' + b"".join(b',"%06x":1' % n for n in range(many)) + b"}",
        "4,990 unknown fields": b'{"prompt":"a"'
        + b"".join(b',"%06x":1' % n for n in range(4_990))
        + b"}",
        "one long number": b'{"seed":' + b"1" * num_bytes + b"}",
        "one long fraction": b'{"strength":0.' + b"1" * num_bytes + b"}",
        "escapes": b'{"prompt":"' + b"\\u0041" * (num_bytes // 6) + b'"}',
        "long prompt": b'{"prompt":"' + b"a" * num_bytes + b'"}',
        "image of noughts": b'{"prompt":"a","image":"' + b"AAAA" * (num_bytes // 4) + b'"}',
    }
    for name, body in bodies.items():
        yield name, "/v1/jobs", body, {"Content-Type": "application/json"}
        if name in ("array of numbers", "unknown fields"):
            path = "/sdapi/v1/img2img"
            yield f"{name} (A1111)", path, body, {"Content-Type": "application/json"}
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    for name, part in (("line ends", b"\r\n"), ("returns", b"\r"), ("almost ends", b"\r\n--")):
        body = head + part * (num_bytes // len(part)) + b"\r\n--b--\r\n"
        yield f"form of {name}", "/v1/images/edits", body, _FORM


def hostile() -> dict[str, Any]:
    """How long `/livez` waits at most while each body is taken apart, a few times."""
    rows = []
    with running_server() as server:
        for name, path, body, headers in hostile_bodies(24 * _MEGA):
            turns = [
                timed_probes(server.url, functools.partial(post, server.url, path, body, headers))
                for _ in range(HOSTILE_TURNS)
            ]
            longest_s = [max(times) for times, _ in turns]
            rows.append(
                {"body": name, "status": turns[0][1], "livez_longest_ms": spread_ms(longest_s)}
            )
    return {"num_bytes": 24 * _MEGA, "rows": rows}


def post(url: str, path: str, body: bytes, headers: dict[str, str]) -> int:
    """The status of the answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=300)
    with contextlib.closing(connection):
        connection.request("POST", path, body, headers)
        return connection.getresponse().status


# ---- soak -----------------------------------------------------------------------------------


def soak() -> dict[str, Any]:
    """Mixed requests from eight clients: what was lost, what was crossed, what memory did."""
    samples: list[tuple[int, float, float]] = []
    with running_server() as server:
        alone = asyncio.run(draw_alone(server.url, make_pictures(100, seed=1)))
        parent, worker = server.process.pid, server.worker_pid
        assert worker is not None

        def look(tally: Tally) -> None:
            if tally.num_images >= SAMPLE_EVERY * len(samples):
                samples.append((tally.num_images, rss_mb(parent), rss_mb(worker)))

        began_s = time.perf_counter()
        tally = asyncio.run(
            mixed_requests(server.url, alone, requests=iter(range(NUM_REQUESTS)), on_request=look)
        )
        seconds = time.perf_counter() - began_s
        ready = json.loads(Caller(server.url).ask("GET", "/readyz"))
        assert server.worker_pid == worker, "the worker was lost"
    settled = samples[len(samples) // 2 :]
    return {
        "num_requests": NUM_REQUESTS,
        "num_clients": 8,
        "seconds": round(seconds, 1),
        "outcomes": dict(sorted(tally.outcomes.items())),
        "num_images": tally.num_images,
        "num_lost": len(tally.lost),
        "num_crossed": len(tally.crossed),
        "left_behind": {name: ready[name] for name in ("num_queued", "num_running")},
        "parent_mb_per_100_images": _slope(settled, 1),
        "worker_mb_per_100_images": _slope(settled, 2),
        "rss_mb": [
            [count, round(parent, 1), round(worker, 1)] for count, parent, worker in samples
        ],
        "faults": tally.lost[:5] + tally.crossed[:5],
    }


def _slope(samples: list[tuple[int, float, float]], column: int) -> float:
    line = statistics.linear_regression(
        [sample[0] for sample in samples], [sample[column] for sample in samples]
    )
    return round(100 * line.slope, 3)


COMMANDS: dict[str, Callable[[], dict[str, Any]]] = {
    "overhead": overhead,
    "livez": livez,
    "hostile": hostile,
    "soak": soak,
    "chaos": server_chaos.chaos,
    "storm": server_chaos.storm,
    "faults": server_chaos.faults,
}


def main() -> None:
    """Run what is asked for, and write its figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=[*COMMANDS, "all"])
    chosen = parser.parse_args().command
    for name in COMMANDS if chosen == "all" else (chosen,):
        figures = {"machine": machine()} | COMMANDS[name]()
        text = json.dumps(figures, indent=1)
        (RESULTS / f"server-{name}.json").write_text(text + "\n", encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
