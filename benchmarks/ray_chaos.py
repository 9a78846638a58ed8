"""Replicas that are killed, and that are added, under load: `python -m benchmarks.ray_chaos`.

Starts `flux-nf4 serve --ray` with the demo model on CPU replicas, and sends it requests over HTTP.
A random replica is ended with SIGKILL every few seconds. Each image is compared with the one that
the same seed gave before, undisturbed: a job that was run again gives the same. Prints a line of
JSON for each number of replicas, one for the kills, and one for how fast one becomes several.
Needs `flux-nf4[ray]`, and Linux: replicas are found in /proc.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_NUM_SEEDS = 12
_SIZE, _STEPS = 256, 20
_READY_TIMEOUT_S = 180.0
_TITLE = "ray::ServeReplica:flux-nf4:replica"


class Server:
    """A server with replicas, as a user starts it."""

    def __init__(self, num_replicas: int, port: int, *, num_at_first: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.num_replicas = num_replicas
        self._num_at_first = num_at_first
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "flux_nf4", "serve", "--ray", "--device", "cpu"),
                *("--port", str(port), "--max-queue", "100000"),
                *("--min-replicas", str(num_at_first), "--max-replicas", str(num_replicas)),
            ],
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> Server:
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while len(self.replicas()) < self._num_at_first or not self._is_ready():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise SystemExit("the server did not get ready")
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()

    def replicas(self) -> list[int]:
        """The process ids of its replicas, by their titles and ancestors."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                parents = _parents(int(folder.name))
            except (OSError, ValueError):
                continue
            if title.startswith(_TITLE) and self._process.pid in parents:
                found.append(int(folder.name))
        return found

    def draw(self, seed: int) -> tuple[str, float]:
        """The hash of an image, or what went wrong; and the seconds it took."""
        body = {"prompt": "a red apple", "seed": seed, "size": f"{_SIZE}x{_SIZE}"}
        request = urllib.request.Request(
            f"{self.url}/v1/images/generations",
            data=json.dumps(body | {"num_inference_steps": _STEPS}).encode(),
            headers={"Content-Type": "application/json"},
        )
        began_s = time.monotonic()
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                image = base64.b64decode(json.load(answer)["data"][0]["b64_json"])
                told = hashlib.sha256(image).hexdigest()
        except urllib.error.HTTPError as error:
            told = json.load(error)["error"]["code"]
        except OSError as error:
            told = f"no answer: {error}"
        return told, time.monotonic() - began_s

    def _is_ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/readyz", timeout=5).status == 200
        except OSError:
            return False


def _parents(pid: int) -> list[int]:
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def measure_throughput(server: Server, num_images: int) -> dict[str, str]:
    """Print images a second; the hash of each seed's image."""
    with ThreadPoolExecutor(4 * server.num_replicas) as clients:
        for _ in clients.map(server.draw, range(2 * server.num_replicas)):  # warm-up
            pass
        began_s = time.monotonic()
        answers = list(clients.map(server.draw, (each % _NUM_SEEDS for each in range(num_images))))
        took_s = time.monotonic() - began_s
    tell(
        what="throughput",
        replicas=server.num_replicas,
        images=num_images,
        images_per_s=round(num_images / took_s, 2),
        median_s=round(statistics.median(seconds for _, seconds in answers), 2),
    )
    return {str(index % _NUM_SEEDS): told for index, (told, _) in enumerate(answers)}


def measure_scaling(server: Server) -> None:
    """Print how long it took from a queue of jobs to the last of the replicas."""
    began_s = time.monotonic()
    with ThreadPoolExecutor(40) as clients:
        asking = [clients.submit(server.draw, seed) for seed in range(40)]
        while len(server.replicas()) < server.num_replicas and not all(a.done() for a in asking):
            time.sleep(0.1)
        took_s = time.monotonic() - began_s
        tell(what="scaling", replicas=[1, len(server.replicas())], seconds=round(took_s, 1))


def measure_kills(server: Server, expected: dict[str, str], seconds: float, every_s: float) -> None:
    """Print what became of the requests while replicas were killed, and how long a new one took."""
    is_over, ends, recoveries, late_s = threading.Event(), Counter[str](), [], []

    def ask(client: int) -> None:
        seed = client
        while not is_over.is_set():
            seed = (seed + 1) % _NUM_SEEDS
            told, took_s = server.draw(seed)
            ends["same image" if told == expected[str(seed)] else told] += 1
            late_s.append(took_s)

    with ThreadPoolExecutor(3 * server.num_replicas) as clients:
        asking = [clients.submit(ask, index) for index in range(3 * server.num_replicas)]
        deadline, num_kills = time.monotonic() + seconds, 0
        while time.monotonic() < deadline:
            time.sleep(every_s)
            before = server.replicas()
            if not before:
                continue
            os.kill(random.choice(before), signal.SIGKILL)
            num_kills, killed_s = num_kills + 1, time.monotonic()
            while not set(server.replicas()) - set(before) and time.monotonic() < deadline:
                time.sleep(0.05)
            recoveries.append(time.monotonic() - killed_s)
        is_over.set()
        for each in asking:
            each.result()
    tell(
        what="kills",
        replicas=server.num_replicas,
        kills=num_kills,
        seconds=seconds,
        ends=dict(ends),
        new_process_s=round(statistics.median(recoveries), 1),
        longest_request_s=round(max(late_s), 1),
    )


def tell(**values: object) -> None:
    """A line of JSON."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Measure what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--kill-seconds", type=float, default=60)
    parser.add_argument("--kill-every", type=float, default=5)
    parser.add_argument("--port", type=int, default=8765)
    options = parser.parse_args()
    for num_replicas in options.replicas:
        with Server(num_replicas, options.port, num_at_first=num_replicas) as server:
            expected = measure_throughput(server, options.images)
            if num_replicas == options.replicas[-1] and options.kill_seconds:
                measure_kills(server, expected, options.kill_seconds, options.kill_every)
    with Server(options.replicas[-1], options.port, num_at_first=1) as server:
        measure_scaling(server)


if __name__ == "__main__":
    main()
