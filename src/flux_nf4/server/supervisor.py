"""One worker process kept alive: started, watched, killed when it hangs, and started again.

The first restart is at once; while a worker dies before it did anything of use, the pauses grow
from 1 to 30 seconds. A worker is its own process group, and its end takes its children along.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import sys
from collections import deque
from typing import TYPE_CHECKING, Any

from flux_nf4.errors import FormatError, InputError
from flux_nf4.pipeline.limits import MAX_SIZE
from flux_nf4.server.frames import (
    error_from,
    make_shared_memory,
    pack_frame,
    put_shared,
    receive_frame,
    take_shared,
)
from flux_nf4.server.jobs import NotReadyError
from flux_nf4.server.status import WorkerState, WorkerStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flux_nf4.server.jobs import JobSpec
    from flux_nf4.server.roles import Listener
    from flux_nf4.server.status import EngineSettings

# `-P`: a `torch.py` in the folder where the server was started is none of ours.
WORKER_COMMAND = (sys.executable, "-P", "-X", "faulthandler", "-m", "flux_nf4.server.worker")

# A step of FLUX.1-dev at 1024 x 1024 is 74 TFLOP: minutes for a CPU of few cores.
_STEP_TIMEOUT_S, _CPU_STEP_TIMEOUT_S = 120.0, 600.0
_LONGEST_PAUSE_S = 30.0
_FAILURES_OF_A_LOOP = 3
# Somebody's SIGKILL tells nothing of the model; the system's, for memory, comes again and again.
_KILLS_FORGIVEN = 8
_EXIT_TIMEOUT_S = 5.0
_LAST_WORDS_TIMEOUT_S = 1.0
_PLAN_TIMEOUT_S = 30.0
_ENDS = ("done", "failed", "cancelled")
_OF_A_JOB = ("stage", "step", "notice", "image", *_ENDS)

_log = logging.getLogger(__name__)


class Supervisor:
    """A worker on one device; `job_id` is what it draws. Everything happens in the event loop."""

    def __init__(
        self,
        device: str,
        settings: EngineSettings,
        listener: Listener,
        command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self.device = device
        self.state: WorkerState = "starting"
        self.job_id: str | None = None
        self.reason: str | None = None
        self.load_error: dict[str, Any] | None = None
        self.num_restarts = 0
        self._usage: dict[str, int] | None = None
        self._settings = settings
        self._listener = listener
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._shared = -1
        self._deadline: asyncio.TimerHandle | None = None
        self._kill_reason: str | None = None
        self._is_cancelling = False
        self._has_drawn = self._was_useful = self._was_killed = False
        self._planned: deque[asyncio.Future[dict[str, Any]]] = deque()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def status(self) -> WorkerStatus:
        """What the engine's status says of it."""
        pid = None if self._process is None else self._process.pid
        return WorkerStatus(
            device=self.device,
            pid=pid,
            state=self.state,
            num_restarts=self.num_restarts,
            usage=self._usage,
        )

    @property
    def _step_timeout_s(self) -> float:
        default = _CPU_STEP_TIMEOUT_S if self.device == "cpu" else _STEP_TIMEOUT_S
        return self._settings.step_timeout_s or default

    def start(self) -> None:
        """Begin; the listener hears the rest.

        Raises:
            InputError: the system cannot hand files to a child process.
        """
        if os.name != "posix":
            raise InputError(
                "the server runs on Linux and macOS only",
                hint="on Windows start it in WSL or in a container",
            )
        self._task = asyncio.create_task(self._live())
        self._task.add_done_callback(_report)

    async def stop(self) -> None:
        """Return when the process is gone: it ends itself, or is killed."""
        self._stopping.set()
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._watch(_EXIT_TIMEOUT_S, "it did not end when told")
        if self._task is not None:
            # Not awaited itself: who gives up waiting must not take the task along.
            await asyncio.wait([self._task])

    def run(self, job_id: str, spec: JobSpec) -> None:
        """Give an idle worker a job."""
        assert self.state == "idle"
        self.state, self.job_id, self._is_cancelling = "busy", job_id, False
        self._was_useful = self._has_drawn  # a worker that dies of its first job was not
        put_shared(self._shared, list(spec.uploads.values()))
        sizes = {name: len(data) for name, data in spec.uploads.items()}
        self._send("job", job=job_id, spec=spec.to_dict(), uploads=sizes)
        self._watch(self._step_timeout_s, "it gave no sign of life")

    async def set_memory(self, vram: int | None) -> dict[str, Any]:
        """Have it keep to another budget from its next job on, and the workers after it as well.

        -> the plan, as `Capabilities.memory`.

        Raises:
            DoesNotFitError: no plan fits.
            InputError: the device does not tell how much is free.
            NotReadyError: it is on its way, or was lost, or is silent.
        """
        if self.state not in ("idle", "busy"):
            raise NotReadyError(f"the worker on {self.device} is not ready")
        planned = asyncio.get_running_loop().create_future()
        self._planned.append(planned)
        self._send("memory", vram=vram)
        try:
            frame = await asyncio.wait_for(planned, _PLAN_TIMEOUT_S)
        except TimeoutError as error:
            raise NotReadyError(f"the worker on {self.device} does not answer") from error
        if frame["error"] is not None:
            raise error_from(frame["error"])
        self._settings = dataclasses.replace(self._settings, vram=vram)
        return dict(frame["memory"])

    def cancel(self) -> None:
        """Have it stop its job at the next step; if it does not, it is killed."""
        if self.job_id is None or self._is_cancelling:
            return
        self._is_cancelling = True
        self._send("cancel", job=self.job_id)
        self._watch(self._step_timeout_s, "it did not stop a cancelled job")

    async def _live(self) -> None:
        num_failures = num_kills = 0
        while not self._stopping.is_set():
            self._has_drawn = self._was_useful = self._was_killed = False
            reason = await self._one_life()
            if self._stopping.is_set():
                break
            num_kills = num_kills + 1 if self._was_killed and not self._was_useful else 0
            is_forgiven = self._was_useful or 0 < num_kills <= _KILLS_FORGIVEN
            num_failures = 1 if is_forgiven else num_failures + 1
            self.num_restarts += 1
            self.state = "failed" if num_failures >= _FAILURES_OF_A_LOOP else "restarting"
            self.reason = reason
            job_id, self.job_id, self._usage = self.job_id, None, None
            self._forget_plans(reason)
            _log.warning("the worker on %s was lost: %s", self.device, reason)
            self._listener.worker_lost(self, job_id, reason)
            pause_s = min(_LONGEST_PAUSE_S, 2.0 ** (num_failures - 2)) if num_failures > 1 else 0
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)

    async def _one_life(self) -> str:
        """Start a process and hear it to its end; why it ended."""
        if self.state != "failed":
            self.state = "starting"
        self._kill_reason = None
        with contextlib.ExitStack() as stack:
            try:
                self._shared = make_shared_memory()
                stack.callback(os.close, self._shared)
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                    pass_fds=(self._shared,),
                    start_new_session=True,
                )
            except OSError as error:
                return f"it could not be started: {error.strerror or error}"
            return await self._follow(self._process)

    async def _follow(self, process: asyncio.subprocess.Process) -> str:
        assert process.stdout is not None
        assert process.stderr is not None
        errors = asyncio.create_task(self._read_errors(process.stderr))
        try:
            if self._stopping.is_set():
                return "stopped"
            return await self._hear(process.stdout)
        finally:
            self._watch(None)
            self._kill()
            await process.wait()
            # A process of its own that has left its group may hold the pipe for ever.
            await asyncio.wait([errors], timeout=_LAST_WORDS_TIMEOUT_S)
            errors.cancel()
            self._process = None

    async def _hear(self, stream: asyncio.StreamReader) -> str:
        self._watch(self._settings.load_timeout_s, "it was not ready in time")
        self._send(
            "settings",
            model=self._settings.model,
            device=self.device,
            shared_memory=self._shared,
            vram=self._settings.vram,
            ram=self._settings.ram,
            arithmetic=self._settings.arithmetic,
            attention=self._settings.attention,
            warm_up=self._settings.warm_up,
        )
        try:
            while True:
                self._handle(await receive_frame(stream))
        except EOFError:
            return await self._cause_of_death()
        except (FormatError, AttributeError, LookupError, TypeError, ValueError) as error:
            _log.exception("the worker on %s cannot be understood", self.device)
            return f"it sent something that is no message: {type(error).__name__}: {error}"

    async def _cause_of_death(self) -> str:
        assert self._process is not None
        self._kill()  # it closed its output, and may still be there
        code = await self._process.wait()
        if self._kill_reason is not None:
            return self._kill_reason
        self._was_killed = code == -signal.SIGKILL
        # Strangers may hear of it: what it said of files and the like is for the log alone.
        if self.load_error is not None:
            _log.error("the worker on %s: %s", self.device, self.load_error["message"])
            return "the model cannot be loaded"
        if code < 0:
            return f"it was ended by {signal.Signals(-code).name}"
        return f"it exited with code {code}"

    def _handle(self, frame: dict[str, Any]) -> None:
        kind = frame["kind"]
        if kind in _OF_A_JOB:
            self._handle_job(kind, frame)
        elif kind == "hello":
            self.device = str(frame["device"])
            self._listener.worker_hello(int(frame["num_devices"]))
        elif kind == "ready":
            self._watch(None)
            self.state, self.reason, self.load_error = "idle", None, None
            self._was_useful, self._usage = True, frame["usage"]
            self._listener.worker_ready(frame["capabilities"])
        elif kind == "memory":
            planned = self._planned.popleft()
            if not planned.done():  # who asked may have given up
                planned.set_result(frame)
        elif kind == "unloadable":
            self.load_error = dict(frame["error"])
        elif kind == "loading":
            self.load_error = None
            self.state = "loading" if self.state == "starting" else self.state
        else:
            raise FormatError(f"`{kind}` is no kind of frame")

    def _handle_job(self, kind: str, frame: dict[str, Any]) -> None:
        size = frame if kind == "image" else frame.get("preview")
        pixels = b"" if size is None else self._take_pixels(size["width"], size["height"])
        job_id = self.job_id
        if job_id is None or frame["job"] != job_id:
            raise FormatError("a worker speaks of a job that is not its own")
        if kind == "cancelled" and not self._is_cancelling:
            raise FormatError("a worker gave up a job by itself")
        if kind in _ENDS:
            self._watch(None)
            self.state, self.job_id, self._usage = "idle", None, frame["usage"]
        elif not self._is_cancelling:
            self._watch(self._step_timeout_s, "it gave no sign of life")
        if kind not in ("stage", "notice"):
            self._has_drawn = self._was_useful = True
        self._listener.worker_frame(self, job_id, frame, pixels)

    def _forget_plans(self, reason: str) -> None:
        while self._planned:
            planned = self._planned.popleft()
            if not planned.done():
                planned.set_exception(NotReadyError(f"the worker was lost: {reason}"))

    def _take_pixels(self, width: int, height: int) -> bytes:
        if not (0 < width <= MAX_SIZE and 0 < height <= MAX_SIZE):
            raise FormatError(f"an image of {width} x {height} pixels")
        pixels = take_shared(self._shared, 3 * width * height)
        self._send("taken")
        return pixels

    def _send(self, kind: str, **values: Any) -> None:
        # Where the process is gone already, what is written is lost, and its end is heard next.
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(pack_frame({"kind": kind} | values))

    def _watch(self, seconds: float | None, reason: str = "") -> None:
        """Kill it after so many seconds from now, in place of what was set before."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if seconds is not None:
            loop = asyncio.get_running_loop()
            text = f"{reason} for {seconds:g} s"
            self._deadline = loop.call_later(seconds, self._kill, text)

    def _kill(self, reason: str | None = None) -> None:
        self._kill_reason = self._kill_reason or reason
        if self.state == "idle":
            self.state = "restarting"  # its end takes a while: nobody gives it a job meanwhile
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _read_errors(self, stream: asyncio.StreamReader) -> None:
        rest = b""
        while chunk := await stream.read(65536):
            *lines, rest = (rest + chunk)[-65536:].split(b"\n")
            for line in lines:
                text = line.decode(errors="replace").rstrip()
                if text:
                    _log.info("worker on %s: %s", self.device, text)


def _report(task: asyncio.Task[None]) -> None:
    """Say that a supervisor itself ended, which only a fault of ours can do."""
    if not task.cancelled() and task.exception() is not None:
        _log.critical("a worker is supervised no more", exc_info=task.exception())
