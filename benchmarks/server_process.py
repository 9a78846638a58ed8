"""A server of our own, `flux-nf4 serve` as people start it, and what its processes hold."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_nf4.cli.machine import processor_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

READY_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A server that is ready: its address, its process, and the file with what it says."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def worker_pid(self) -> int | None:
        """The worker's process; None while there is none."""
        return next(iter(children(self.process.pid)), None)


def children(pid: int) -> list[int]:
    """The children of a process, whichever of its threads started them; a zombie is none."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, thread.read_text().split())
    return [each for each in found if is_running(each)]


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def rss_mb(pid: int) -> float:
    """A process's resident memory in MB (10^6 bytes)."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert match is not None
    return int(match.group(1)) * 1024 / 1e6


@contextlib.contextmanager
def running_server(*options: str) -> Iterator[ServerProcess]:
    """A server of the demo model on the CPU for the time of the block.

    Raises:
        RuntimeError: it did not become ready; with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            command = [sys.executable, "-m", "flux_nf4", "serve", "--port", "0"]
            process = subprocess.Popen(
                [*command, "--device", "cpu", *options], stderr=file, stdout=file
            )
        try:
            until(lambda: b"ready after" in log.read_bytes() or process.poll() is not None)
            match = re.search(r"page\s+(http://\S+)/", log.read_text())
            if match is None or process.poll() is not None:
                raise RuntimeError(log.read_text())
            yield ServerProcess(match.group(1), process, log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def until(condition: Callable[[], object], timeout_s: float = READY_TIMEOUT_S) -> float:
    """Return when `condition()` is true, with the seconds that it took.

    Raises:
        TimeoutError: it did not become so.
    """
    began_s = time.perf_counter()
    while not condition():
        if time.perf_counter() - began_s > timeout_s:
            raise TimeoutError("it did not happen in time")
        time.sleep(0.01)
    return time.perf_counter() - began_s


def machine() -> dict[str, Any]:
    """What figures depend on."""
    return {
        "cpu": processor_name(),
        "num_cores": len(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "load_average": [round(load, 1) for load in os.getloadavg()],
    }
