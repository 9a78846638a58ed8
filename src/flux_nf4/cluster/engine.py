"""The server's engine with its workers elsewhere: queue, jobs and retries stay in this process.

A job goes to Ray Serve's router when one of as many *slots* is free as there may be replicas, and
waits there until a replica is. What waits makes Ray Serve start more replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

from flux_nf4.cluster.replica import LAST_FRAMES
from flux_nf4.server.engine import Engine
from flux_nf4.server.status import WorkerState, WorkerStatus

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from flux_nf4.server.jobs import JobSpec
    from flux_nf4.server.roles import Listener
    from flux_nf4.server.status import EngineSettings

# A router may still know a replica that is dead: what no replica began is sent again.
_MAX_SENDINGS = 10
_SENDING_PAUSE_S = 0.5

_log = logging.getLogger(__name__)


class Slot:
    """A place for one job in the cluster: for the engine it is a worker like a `Supervisor`."""

    def __init__(self, device: str, listener: Listener) -> None:
        self.device = device
        self.state: WorkerState = "loading"
        self.job_id: str | None = None
        self.reason: str | None = None
        self.load_error: dict[str, Any] | None = None
        self.num_restarts = 0
        self.replicas: Any = None  # a handle of Ray Serve's
        self._listener = listener
        self._frames: Any = None
        self._is_cancelling = False
        self._task: asyncio.Task[None] | None = None

    @property
    def status(self) -> WorkerStatus:
        """What the engine's status says of it."""
        return WorkerStatus(
            device=self.device, pid=None, state=self.state, num_restarts=self.num_restarts
        )

    def run(self, job_id: str, spec: JobSpec) -> None:
        """Send a job to whichever replica is free first."""
        self.state, self.job_id, self._is_cancelling = "busy", job_id, False
        self._task = asyncio.create_task(self._follow(job_id, spec))

    def cancel(self) -> None:
        """Have its job stopped, at its next step if a replica draws it."""
        if self.job_id is not None and not self._is_cancelling:
            self._is_cancelling = True
            if self._frames is not None:
                self._frames.cancel()

    async def stop(self) -> None:
        """Return when nothing of it is left here; the replicas are Ray's to stop."""
        self.cancel()
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _follow(self, job_id: str, spec: JobSpec) -> None:
        for attempt in range(_MAX_SENDINGS):
            if attempt:
                await asyncio.sleep(_SENDING_PAUSE_S)
            last, was_begun = await self._hear(job_id, spec)
            if was_begun or last["kind"] != "lost":
                break
        self.job_id, self.state = None, "idle"
        if last["kind"] != "lost":
            self._listener.worker_frame(self, job_id, last, b"")
            return
        self.num_restarts += 1
        _log.warning("a replica was lost: %s", last["reason"])
        self._listener.worker_lost(self, job_id, last["reason"])

    async def _hear(self, job_id: str, spec: JobSpec) -> tuple[dict[str, Any], bool]:
        """The last frame of one sending, and whether a replica had begun it."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        was_begun = False
        if self._is_cancelling:
            return {"kind": "cancelled", "job": job_id}, False
        self._frames = self.replicas.options(stream=True).draw.remote(job_id, spec)
        try:
            async for frame, pixels in self._frames:
                was_begun = True
                if frame["kind"] in LAST_FRAMES:
                    return frame, True
                self._listener.worker_frame(self, job_id, frame, pixels)
            reason = "its replica fell silent"
        except asyncio.CancelledError:
            if not self._is_cancelling:
                raise
            reason = "it was cancelled"
        except (RayError, RayServeException) as error:
            reason = f"its replica was lost: {type(error).__name__}"
            _log.info("job %s: %s", job_id, error)
        finally:
            self._frames = None
        kind = "cancelled" if self._is_cancelling else "lost"
        return {"kind": kind, "job": job_id, "reason": reason}, was_begun


class ClusterEngine(Engine):
    """An engine with `num_slots` slots; `deploy` starts the replicas, and gives a handle on them.

    `deploy` may take minutes; the engine is not ready before.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        num_slots: int,
        deploy: Callable[[], Awaitable[Any]],
    ) -> None:
        super().__init__(settings)
        self._num_slots = num_slots
        self._deploy = deploy
        self._slots: list[Slot] = []
        self._deploying: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """As an engine on one machine."""
        await super().start()
        self._deploying = asyncio.create_task(self._connect())

    async def stop(self) -> None:
        """As an engine on one machine; the replicas stay."""
        if self._deploying is not None:
            self._deploying.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._deploying
        await super().stop()

    def _add_worker(self, device: str) -> None:  # noqa: ARG002
        self._slots = [Slot(f"ray:{index}", self) for index in range(self._num_slots)]
        self._workers.extend(self._slots)

    async def _connect(self) -> None:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        replicas, capabilities = None, {}
        try:
            replicas = await self._deploy()
            capabilities, load_error = await replicas.describe.remote()
        except (RayError, RayServeException, RuntimeError, OSError) as error:
            _log.exception("no replica can be started")
            message = f"no replica can be started: {type(error).__name__}"
            load_error = {"message": message, "hint": "the log of the server says more"}
        for slot in self._slots:
            slot.replicas, slot.load_error = replicas, load_error
            slot.reason = "the model cannot be loaded" if load_error else None
            slot.state = "failed" if load_error else "idle"
        if load_error is None:
            self.worker_ready(capabilities)
        else:
            self._say_changed()
