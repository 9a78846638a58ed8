"""What every training command shares: a log, a polite way to stop, and torch's settings."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

STARTED = time.monotonic()


class Log:
    """Lines with the seconds since the start, to the terminal and to a file."""

    def __init__(self, name: str, path: Path | None = None) -> None:
        self._name = name
        self._path = path

    def __call__(self, message: str) -> None:
        """Write one line."""
        line = f"[{self._name} {time.monotonic() - STARTED:7.1f}] {message}"
        print(line, flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(line + "\n")


class StopRequest:
    """True once someone asked this process to stop (SIGTERM, SIGINT): save, then leave."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        if self._asked:
            sys.exit(1)  # asked twice: at once
        self._asked = True

    def __bool__(self) -> bool:
        return self._asked


class StageClock:
    """Seconds spent training in a stage, over all runs; the device is waited for when read."""

    def __init__(self, seconds_before: float) -> None:
        self._before = seconds_before
        self._start = time.monotonic()

    def read(self) -> float:
        """Seconds so far."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._before + time.monotonic() - self._start


@contextlib.contextmanager
def torch_settings(*, cudnn_attention: bool = False) -> Iterator[None]:
    """Fast float32 products, cuDNN's search for algorithms, and, if asked, its attention first."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    # Blocks of one kind share their code: each instance may count as one more recompilation.
    torch._dynamo.config.cache_size_limit = 64
    if not cudnn_attention:
        yield
        return
    backends = [
        *(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
        *(SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    ]
    with sdpa_kernel(backends, set_priority=True):
        yield


def default_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU; a CPU stays in float32, which it is faster in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """Arithmetic in `compute_dtype` on float32 weights."""
    is_cast = compute_dtype(device) != torch.float32
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_cast)


def slowest_kernels(step: Callable[[], None], *, num_steps: int = 5, num_rows: int = 40) -> str:
    """A table of where the time of a training step goes, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    is_cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as run:
        for _ in range(num_steps):
            step()
        if is_cuda:
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if is_cuda else "self_cpu_time_total"
    table = run.key_averages().table(sort_by=order, row_limit=num_rows, max_name_column_width=90)
    return f"{num_steps} steps:\n{table}"


def ramp(step: int, num_steps: int) -> float:
    """Linear warm-up: from 1 / num_steps at step 0 to 1."""
    return min(1.0, (step + 1) / num_steps)


def decay(done: float, *, start: float = 0.4, floor: float = 0.005) -> float:
    """1 until the share `start` of a stage is done, then linear down to `floor`."""
    return 1.0 if done < start else max(floor, (1 - done) / (1 - start))
