"""What an engine is told at its start, and what it tells of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from flux_nf4.pipeline.request import check_number, check_whole_number

if TYPE_CHECKING:
    from pathlib import Path

WorkerState: TypeAlias = Literal["starting", "loading", "idle", "busy", "restarting", "failed"]

_MANY = 10**6
_WEEK_S = 7 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Which model on which devices, and how much is taken on.

    `model` None is the demo model. `device`: `auto` (a CUDA device if there is one, else the CPU),
    `all` (a worker for each CUDA device), or one by name. A worker that gives no sign of life for
    `step_timeout_s` while it draws (None: 120 s, on a CPU 600), or is not ready `load_timeout_s`
    after its start, is killed.
    `max_queue` jobs may wait, and more only of owners who have less than their share of these.
    `journal` is the file that keeps unfinished jobs over a restart of the server; None keeps none.
    `vram`, `ram` (in bytes), `arithmetic` and `attention` are each worker's, as in `LoadSettings`.
    `warm_up`: on a GPU a worker draws an image before it takes jobs, so that the first is no slower
    than others.
    Finished jobs are kept up to `max_kept_jobs` and `max_kept_bytes`, the newest of them.

    Raises:
        InputError: a number is out of range.
    """

    model: str | None = None
    device: str = "auto"
    max_queue: int = 32
    max_running_per_owner: int | None = None
    step_timeout_s: float | None = None
    load_timeout_s: float = 600.0
    journal: Path | None = None
    vram: int | None = None
    ram: int | None = None
    arithmetic: str = "bf16"
    attention: str = "exact"
    warm_up: bool = True
    max_kept_jobs: int = 1000
    max_kept_bytes: int = 512 * 2**20

    def __post_init__(self) -> None:
        check_whole_number("max_queue", self.max_queue, 1, _MANY)
        if self.max_running_per_owner is not None:
            check_whole_number("max_running_per_owner", self.max_running_per_owner, 1, _MANY)
        if self.step_timeout_s is not None:
            check_number("step_timeout_s", self.step_timeout_s, 0.01, _WEEK_S)
        check_number("load_timeout_s", self.load_timeout_s, 0.01, _WEEK_S)
        check_whole_number("max_kept_jobs", self.max_kept_jobs, 1, _MANY)
        check_whole_number("max_kept_bytes", self.max_kept_bytes, 0, 2**50)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What the loaded model is; sizes in pixels, lengths in tokens.

    `sha` tells it from others: `model_facts.fingerprint`.
    `memory` is the plan for the device: `vram` (the setting; None is `auto`), the `device_bytes`
    that it comes to, the `total_bytes` of the device (None: unknown), the `step_bytes` that pass
    through it in each step, and under `plan` the `name` and `peak_bytes` of each phase; None where
    nothing is planned, as on a CPU.
    """

    model: str
    variant: str
    quantization: str
    device: str
    dtype: str
    default_width: int
    default_height: int
    default_steps: int
    embeds_guidance: bool
    max_sequence_length: int
    licence: str
    is_demo: bool
    sha: str = ""
    memory: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker process. `failed`: it ended badly several times in a row, and is tried again.

    `usage` is of the device's memory, in bytes, as its last image left it: the `budget`, weights
    that are `resident`, the `peak` of what was allocated, and all that was `moved` there since it
    began.
    """

    device: str
    pid: int | None
    state: WorkerState
    num_restarts: int
    usage: dict[str, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """The whole engine. `reason` says why it is not ready; None when it is."""

    is_ready: bool
    is_draining: bool
    reason: str | None
    workers: tuple[WorkerStatus, ...]
    num_queued: int
    num_running: int
