"""What runs on each device of the cluster: a supervised worker, for one job at a time.

It is the same worker process as on one machine, watched by the same supervisor; its frames go to
the engine as they are. So a device that hangs or runs out of memory is the replica's affair, and
only the death of the whole replica is the engine's.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from flux_nf4.server.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from flux_nf4.server.jobs import JobSpec
    from flux_nf4.server.roles import Worker
    from flux_nf4.server.status import EngineSettings

LAST_FRAMES = ("done", "failed", "cancelled", "lost")


class Replica:
    """Ready when its model is loaded, or cannot be."""

    async def __init__(self, settings: EngineSettings) -> None:  # type: ignore[misc]
        self._capabilities: dict[str, Any] = {}
        self._frames: asyncio.Queue[tuple[dict[str, Any], bytes]] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._worker = Supervisor(settings.device, settings, self)
        self._worker.start()
        await self._until(lambda: bool(self._capabilities or self._worker.load_error))

    async def describe(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What the loaded model is, and the error with which it could not be loaded."""
        return self._capabilities, self._worker.load_error

    async def draw(self, job_id: str, spec: JobSpec) -> AsyncIterator[tuple[dict[str, Any], bytes]]:
        """The frames of a job with their pixels, to the last; who stops listening stops the job."""
        # The job before may be stopping still, or its worker be on its way back.
        await self._until(lambda: self._worker.state == "idle")
        frames: asyncio.Queue[tuple[dict[str, Any], bytes]] = asyncio.Queue()
        self._frames = frames
        self._worker.run(job_id, spec)
        try:
            kind = ""
            while kind not in LAST_FRAMES:
                frame, pixels = await frames.get()
                kind = frame["kind"]
                yield frame, pixels
        finally:
            if self._worker.job_id == job_id:
                self._worker.cancel()

    def check_health(self) -> None:
        """Asked by Ray Serve, which replaces a replica that raises.

        Raises:
            RuntimeError: its worker dies at every start.
        """
        if self._worker.state == "failed" and self._capabilities:
            raise RuntimeError(self._worker.reason)

    def worker_hello(self, num_devices: int) -> None:
        """Ray gives each replica one device."""

    def worker_ready(self, capabilities: dict[str, Any]) -> None:
        """The model is loaded."""
        self._capabilities = capabilities
        self._say_changed()

    def worker_frame(
        self,
        worker: Worker,
        job_id: str,  # noqa: ARG002
        frame: dict[str, Any],
        pixels: bytes,
    ) -> None:
        """Its job went on, or ended."""
        self._frames.put_nowait((frame, pixels))
        if worker.job_id is None:
            self._say_changed()

    def worker_lost(
        self,
        worker: Worker,  # noqa: ARG002
        job_id: str | None,
        reason: str,
    ) -> None:
        """The worker process died; the supervisor starts another."""
        if job_id is not None:
            self._frames.put_nowait(({"kind": "lost", "reason": reason}, b""))
        self._say_changed()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def _say_changed(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
