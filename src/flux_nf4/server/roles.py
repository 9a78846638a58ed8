"""What an engine and those who draw for it are to each other, wherever they draw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from flux_nf4.server.jobs import JobSpec
    from flux_nf4.server.status import WorkerState, WorkerStatus


class Worker(Protocol):
    """What an engine gives jobs to: here a `Supervisor`, a place on another host in a cluster.

    `job_id` is what it draws; `load_error` the fields with which its model cannot be loaded.
    """

    state: WorkerState
    device: str
    job_id: str | None
    reason: str | None
    load_error: dict[str, Any] | None

    @property
    def status(self) -> WorkerStatus:
        """What the engine's status says of it."""

    def run(self, job_id: str, spec: JobSpec) -> None:
        """Take a job; it must be idle."""

    def cancel(self) -> None:
        """Stop the job, if there is one, at its next step."""

    async def stop(self) -> None:
        """Return when nothing of it is left."""


class Listener(Protocol):
    """Who hears of a worker: the engine. Nothing here may raise but for what a frame holds."""

    def worker_hello(self, num_devices: int) -> None:
        """The machine has so many devices of the worker's kind."""

    def worker_ready(self, capabilities: dict[str, Any]) -> None:
        """It can draw."""

    def worker_frame(
        self, worker: Worker, job_id: str, frame: dict[str, Any], pixels: bytes
    ) -> None:
        """Its job went on or ended; `pixels` are RGB, or empty."""

    def worker_lost(self, worker: Worker, job_id: str | None, reason: str) -> None:
        """It died, with this job in hand."""
