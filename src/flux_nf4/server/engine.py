"""The server's engine: jobs in, events and images out, whatever happens to the workers.

A job that was accepted ends: in its images, or in an error that says why. It is fixed when it is
accepted, its seed too, so a job whose worker died is run once more and gives the same images.
Everything here happens in one event loop; nothing here imports torch.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from flux_nf4.server.failures import FAULTS
from flux_nf4.server.frames import error_from
from flux_nf4.server.jobs import (
    Api,
    DrainingError,
    FinalState,
    Job,
    JobError,
    JobSpec,
    NotReadyError,
    QueueFullError,
)
from flux_nf4.server.journal import Journal
from flux_nf4.server.known_jobs import KnownJobs
from flux_nf4.server.pace import Pace
from flux_nf4.server.queue import FairQueue
from flux_nf4.server.running import (
    ERROR_OF_FAULT,
    CancelCause,
    Running,
    error_of_cancel,
    error_of_loss,
)
from flux_nf4.server.status import Capabilities, EngineSettings, EngineStatus, WorkerStatus
from flux_nf4.server.supervisor import WORKER_COMMAND, Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flux_nf4.server.roles import Worker

__all__ = ["Capabilities", "Engine", "EngineSettings", "EngineStatus", "WorkerStatus"]

_MAX_ATTEMPTS = 2
_LONGEST_RETRY_S = 120.0  # clients give up on longer ones
_UNKNOWN_RETRY_S = 10.0

_log = logging.getLogger(__name__)


class Engine:
    """A queue before one worker a device.

    `on_event` holds observers, called at once with a name and its facts; they must not raise:

        job_queued      api, job
        job_started     queue_s
        stage           stage, duration_s        when it is over; `save`: making a file
        step            duration_s
        first_preview   duration_s               from the job's acceptance
        image           width, height
        job_cancelled   cause
        job_finished    api, state, duration_s (from its acceptance), code (or None)
        rejected        reason        `queue_full`, `draining`, `not_ready`, `rate_limit`
        out_of_memory   stage, action            `failed`, or `shrunk`: to a smaller plan
        worker_restarted  device, reason
        replayed        reason, job              `worker_lost` or `restart`; the job of a restart
    """

    def __init__(
        self, settings: EngineSettings, *, worker_command: Sequence[str] = WORKER_COMMAND
    ) -> None:
        self.settings = settings
        self.capabilities: Capabilities | None = None
        self.on_event: list[Callable[..., None]] = []
        self._worker_command = worker_command
        self._workers: list[Worker] = []
        self._queue = FairQueue()
        self._running: dict[str, Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs = KnownJobs(settings)
        self._pace = Pace()
        self._journal: Journal | None = None
        self._is_draining = False
        self._is_stopping = False
        self._workers_changed = asyncio.Event()

    async def start(self) -> None:
        """Open the journal, take up the jobs in it, and start the workers; does not wait for them.

        Raises:
            FormatError, InputError, DiskError: the journal cannot be used.
        """
        if self.settings.journal is not None:
            self._journal = Journal(self.settings.journal)
            for job in self._journal.jobs():
                self._take_up(job)
        self._add_worker(self.settings.device)

    async def wait_ready(self) -> None:
        """Return when a worker can draw.

        Raises:
            FluxNF4Error: the model cannot be loaded; of the class that loading it raised.
        """
        while not any(worker.state in ("idle", "busy") for worker in self._workers):
            if self._workers and all(worker.load_error for worker in self._workers):
                raise error_from(self._workers[0].load_error or {})
            await self._workers_changed.wait()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, and return when all jobs are finished or the time is over."""
        self._is_draining = True
        unfinished = [asyncio.create_task(job.wait()) for job in self._jobs.unfinished()]
        if unfinished:
            _, late = await asyncio.wait(unfinished, timeout=timeout_s)
            for task in late:
                task.cancel()

    async def stop(self) -> None:
        """End every job that is not finished, and every process; with a journal the jobs wait.

        May be called again, while it is at it too.
        """
        self._is_draining = self._is_stopping = True
        for job in self._jobs.unfinished():
            if job.state == "running":  # interrupted on purpose: no fault of its own
                self._note(job, job.num_attempts - 1)
            self.cancel(job.id, cause="shutdown")
        await asyncio.gather(*(worker.stop() for worker in self._workers))
        for running in self._running.values():
            running.put({"kind": "lost", "reason": "the server stopped"}, b"")
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def submit(self, spec: JobSpec, *, owner: str, api: Api) -> Job:
        """Accept a job: from now on it ends in its images or in an error.

        Raises:
            DrainingError: the server is about to stop.
            NotReadyError: all workers die over and over; nobody knows when one will not.
            QueueFullError: too many jobs wait already, the owner's own among them.
            DiskError: the journal could not be written.
        """
        if self._is_draining:
            self._observe("rejected", reason="draining")
            raise DrainingError(
                "the server is shutting down and takes nothing new",
                hint="try again when it is back",
            )
        if self._workers and all(worker.state == "failed" for worker in self._workers):
            self._observe("rejected", reason="not_ready")
            raise NotReadyError(self._reason() or "")
        if self._queue.is_full(owner, self.settings.max_queue):
            self._observe("rejected", reason="queue_full")
            raise QueueFullError(
                f"the queue is full: {len(self._queue)} jobs wait",
                retry_after_s=self._retry_after_s(),
            )
        job = Job(spec, owner=owner, api=api)
        if self._journal is not None:
            self._journal.add(job)
        self._jobs.add(job)
        self._queue.push(job)
        self._observe("job_queued", api=api, job=job)
        self._hand_out()
        return job

    def job(self, job_id: str, *, owner: str) -> Job | None:
        """An owner's own job, if it is still known."""
        job = self._jobs.get(job_id)
        return job if job is not None and job.owner == owner else None

    def jobs(self, *, owner: str) -> list[Job]:
        """An owner's own jobs, the oldest first."""
        return self._jobs.of(owner)

    def cancel(self, job_id: str, *, cause: CancelCause) -> bool:
        """Stop a job: at once if it waits, else at its next step. Whether there was one to stop."""
        job = self._jobs.get(job_id)
        if job is None or job.is_finished:
            return False
        running = self._running.get(job_id)
        if running is None:
            self._queue.remove(job)
            self._finish_cancelled(job, cause)
            return True
        running.cause = running.cause or cause
        self._stop_drawing(job_id)
        return True

    def forget(self, job_id: str) -> None:
        """Drop a finished job and its images; one that is not finished stays."""
        self._jobs.forget(job_id)

    def position(self, job: Job) -> int:
        """Its place in the queue, from 1; 0 if it does not wait."""
        if job.state != "queued":
            return 0
        return next((place for place, other in enumerate(self._queue, 1) if other is job), 0)

    def eta_s(self, job: Job) -> float | None:
        """Seconds until it is done, at today's pace; None if nobody knows, or it is finished."""
        own_s = None if job.is_finished else self._pace.remaining_s(job)
        if own_s is None or job.state == "running":
            return own_s
        before_s = sum(self._pace.remaining_s(each.job) or 0.0 for each in self._running.values())
        for other in self._queue:
            if other is job:
                break
            before_s += self._pace.remaining_s(other) or 0.0
        num_ready = sum(worker.state in ("idle", "busy") for worker in self._workers)
        return before_s / max(1, num_ready) + own_s

    @property
    def supervisors(self) -> list[Supervisor]:
        """Its workers on this machine; elsewhere there are none."""
        return [worker for worker in self._workers if isinstance(worker, Supervisor)]

    def status(self) -> EngineStatus:
        """Whether it can draw, and how much it has to do."""
        reason = self._reason()
        return EngineStatus(
            is_ready=reason is None,
            is_draining=self._is_draining,
            reason=reason,
            workers=tuple(worker.status for worker in self._workers),
            num_queued=len(self._queue),
            num_running=len(self._running),
        )

    def worker_hello(self, num_devices: int) -> None:
        """With `all`, the first worker tells how many there are to be."""
        if self.settings.device == "all" and len(self._workers) == 1:
            for index in range(1, num_devices):
                self._add_worker(f"cuda:{index}")

    def worker_ready(self, capabilities: dict[str, Any]) -> None:
        """It takes jobs from now on."""
        self.capabilities = Capabilities(**capabilities)
        self._say_changed()
        self._hand_out()

    def worker_frame(
        self, worker: Worker, job_id: str, frame: dict[str, Any], pixels: bytes
    ) -> None:
        """Its job went on, or ended."""
        running = self._running.get(job_id)
        if running is not None:
            running.put(frame, pixels)
            running.is_drawing = worker.job_id is not None
        if worker.job_id is None:
            self._hand_out()

    def worker_lost(self, worker: Worker, job_id: str | None, reason: str) -> None:
        """Its job has another try, or none."""
        self._observe("worker_restarted", device=worker.device, reason=reason)
        self._say_changed()
        running = self._running.get(job_id or "")
        if running is not None:
            running.is_drawing = False
            running.put({"kind": "lost", "reason": reason}, b"")

    def _add_worker(self, device: str) -> None:
        """Where an engine of another kind has workers of its own."""
        worker = Supervisor(device, self.settings, self, self._worker_command)
        self._workers.append(worker)
        worker.start()

    def _take_up(self, job: Job) -> None:
        """A job out of the journal: it was accepted by the server that was here before."""
        self._jobs.add(job)
        self._observe("replayed", reason="restart", job=job)
        if job.num_attempts >= _MAX_ATTEMPTS:
            self._finish(job, "failed", error_of_loss("the server ended"))
        else:
            self._queue.push(job)

    def _hand_out(self) -> None:
        """Give idle workers the jobs that are next."""
        for worker in self._workers:
            if worker.state != "idle" or self._is_stopping:
                continue
            job = self._queue.pop(self._may_run)
            if job is None:
                return
            assert self.capabilities is not None
            self._running[job.id] = Running(job, self.capabilities, self._pace, self._observe)
            job.start()
            self._note(job, job.num_attempts)
            if job.num_attempts == 1:
                self._observe("job_started", queue_s=(job.started_at or 0) - job.created_at)
            worker.run(job.id, job.spec)
            task = asyncio.create_task(self._tell(self._running[job.id]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _stop_drawing(self, job_id: str) -> None:
        for worker in self._workers:
            if worker.job_id == job_id:
                worker.cancel()

    def _may_run(self, owner: str) -> bool:
        limit = self.settings.max_running_per_owner
        if limit is None:
            return True
        running = self._running.values()
        return sum(each.is_drawing and each.job.owner == owner for each in running) < limit

    async def _tell(self, running: Running) -> None:
        """Follow an attempt at a job to its end."""
        job = running.job
        try:
            last = await running.tell()
            error = JobError(**last["error"]) if last["kind"] == "failed" else None
        except FAULTS:
            # A frame without its fields, or an image that cannot be encoded: a fault of ours.
            _log.exception("job %s", job.id)
            last, error = {"kind": "failed"}, ERROR_OF_FAULT
            self._stop_drawing(job.id)
        del self._running[job.id]
        match last["kind"]:
            case "done" | "failed" as state:
                self._finish(job, state, error)
            case _ if running.cause is not None:
                self._finish_cancelled(job, running.cause)
            case _ if job.num_attempts < _MAX_ATTEMPTS:
                job.retry()
                self._queue.push_again(job)
                self._observe("replayed", reason="worker_lost")
            case _:
                self._finish(job, "failed", error_of_loss(last["reason"]))
        self._hand_out()

    def _finish_cancelled(self, job: Job, cause: CancelCause) -> None:
        is_kept = cause == "shutdown" and self._journal is not None
        error = error_of_cancel(cause, is_kept=is_kept)
        self._observe("job_cancelled", cause=cause)
        self._finish(job, "failed" if cause == "timeout" else "cancelled", error, is_kept=is_kept)

    def _finish(
        self, job: Job, state: FinalState, error: JobError | None, *, is_kept: bool = False
    ) -> None:
        if not is_kept:
            self._note(job, None)
        job.finish(state, error)
        self._observe(
            "job_finished",
            api=job.api,
            state=state,
            duration_s=(job.finished_at or 0) - job.created_at,
            code=None if error is None else error.code,
        )
        self._jobs.finished(job)

    def _note(self, job: Job, num_attempts: int | None) -> None:
        if self._journal is not None:
            self._journal.note(job, num_attempts)

    def _retry_after_s(self) -> float:
        """When a place in the queue will be free: when the first of the running jobs is done."""
        soonest = [self._pace.remaining_s(each.job) for each in self._running.values()]
        known = [seconds for seconds in soonest if seconds is not None]
        return min(_LONGEST_RETRY_S, max(1.0, min(known, default=_UNKNOWN_RETRY_S)))

    def _reason(self) -> str | None:
        """Why nothing can be drawn; None if it can."""
        if self._is_draining:
            return "the server is shutting down"
        if self._journal is not None and not self._journal.is_writable():
            return "the disk is full, or cannot be written to"
        if any(worker.state in ("idle", "busy") for worker in self._workers):
            return None
        reasons = [worker.reason for worker in self._workers if worker.reason]
        return f"the worker was lost: {reasons[0]}" if reasons else "the model is being loaded"

    def _say_changed(self) -> None:
        changed, self._workers_changed = self._workers_changed, asyncio.Event()
        changed.set()

    def _observe(self, name: str, **facts: Any) -> None:
        for observer in self.on_event:
            observer(name, **facts)
