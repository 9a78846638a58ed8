"""An engine without a worker: it draws gradients in the event loop, as fast or slowly as told."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import itertools
import time
from collections import deque

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flux_nf4.pipeline.image_metadata import ImageSettings, png_texts
from flux_nf4.server.jobs import DrainingError, Job, JobError, JobImage, QueueFullError
from flux_nf4.server.status import Capabilities, EngineSettings, EngineStatus, WorkerStatus


def fake_capabilities(**changes):
    """What the demo model's worker says when it is ready."""
    values = {
        "model": "demo",
        "variant": "dev",
        "quantization": "nf4 v2",
        "device": "cpu",
        "dtype": "bfloat16",
        "default_width": 64,
        "default_height": 64,
        "default_steps": 20,
        "embeds_guidance": True,
        "max_sequence_length": 512,
        "licence": "Apache-2.0",
        "is_demo": True,
    }
    return Capabilities(**(values | changes))


def draw_gradient(width, height, seed):
    """An RGB picture that differs with its seed. -> (H, W, 3) uint8."""
    colour = np.frombuffer(hashlib.sha256(str(seed).encode()).digest()[:3], np.uint8)
    ramp = (
        np.linspace(0.2, 1.0, width)[None, :, None] * np.linspace(1.0, 0.6, height)[:, None, None]
    )
    return (ramp * colour).astype(np.uint8)


def encode_png(pixels, spec, seed, model="demo"):
    """A PNG with the texts that the real encoder writes."""
    settings = ImageSettings(
        prompt=spec.prompt,
        negative_prompt=spec.negative_prompt,
        width=spec.width,
        height=spec.height,
        num_inference_steps=spec.num_inference_steps,
        guidance_scale=spec.guidance_scale,
        distilled_guidance_scale=spec.distilled_guidance_scale,
        seed=seed,
        schedule=spec.schedule,
        max_sequence_length=512,
        model=model,
        quantization="nf4 v2",
        dtype="bfloat16",
    )
    texts = PngInfo()
    for keyword, text in png_texts(settings).items():
        texts.add_itxt(keyword, text)
    return _encoded(pixels, "PNG", pnginfo=texts)


def _encoded(pixels, form, **more):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **more)
    return file.getvalue()


class FakeEngine:
    """The public face of `server.engine.Engine`, with levers for tests.

    `step_s` is how long a step takes. `hold()` stops before each step until `allow_steps(n)` or
    `release()`. `fail_next` is the `JobError` that the next job ends in; `notices` are told by
    every job. `started_steps` counts the steps of all jobs.
    """

    def __init__(self, *, step_s=0.0, max_queue=32, max_kept_jobs=1000, capabilities=None):
        self.capabilities = capabilities or fake_capabilities()
        self.settings = EngineSettings(max_queue=max_queue, max_kept_jobs=max_kept_jobs)
        self.step_s = step_s
        self.fail_next = None
        self.notices = []
        self.started_steps = 0
        self.on_event = []
        self.is_draining = False
        self.reason = None
        self.load_error = None
        self.supervisors = []
        self.cancel_causes = {}
        self._jobs = {}
        self._waiting = deque()
        self._lost = set()
        self._running = None
        self._task = None
        self._wake = asyncio.Event()
        self._num_allowed = None
        self._allowed = asyncio.Event()

    # ---- levers ---------------------------------------------------------------------------------

    def hold(self):
        """From now on every step waits for `allow_steps`."""
        self._num_allowed = 0

    def allow_steps(self, count):
        self._num_allowed += count
        self._allowed.set()

    def release(self):
        self._num_allowed = None
        self._allowed.set()

    def draw_again(self, job):
        """Lose the worker that draws `job`: it waits, and is drawn from the beginning."""
        self._lost.add(job.id)

    def take_up(self, job):
        """As if a server before had accepted it."""
        self._jobs[job.id] = job
        self._tell("replayed", reason="restart", job=job)

    # ---- the engine's face ----------------------------------------------------------------------

    async def start(self):
        self._task = asyncio.create_task(self._work())

    async def wait_ready(self):
        if self.load_error is not None:
            raise self.load_error

    async def stop(self):
        self.is_draining = True
        for job in self._jobs.values():
            if not job.is_finished:
                self._finish(job, "cancelled", _shutdown())
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def drain(self, timeout_s):
        self.is_draining = True
        unfinished = [job for job in self._jobs.values() if not job.is_finished]
        waits = [asyncio.create_task(job.wait()) for job in unfinished]
        if waits:
            _, late = await asyncio.wait(waits, timeout=timeout_s)
            for task in late:
                task.cancel()

    def submit(self, spec, *, owner, api):
        if self.is_draining:
            self._tell("rejected", reason="draining")
            raise DrainingError("the server is shutting down and takes nothing new")
        if len(self._waiting) >= self.settings.max_queue:
            self._tell("rejected", reason="queue_full")
            raise QueueFullError(
                f"the queue is full: {len(self._waiting)} jobs wait", retry_after_s=3.0
            )
        job = Job(spec, owner=owner, api=api)
        self._jobs[job.id] = job
        while len(self._jobs) > self.settings.max_kept_jobs:
            oldest = next(job for job in self._jobs.values() if job.is_finished)
            del self._jobs[oldest.id]
        self._waiting.append(job)
        self._tell("job_queued", api=api, job=job)
        self._wake.set()
        return job

    def job(self, job_id, *, owner):
        job = self._jobs.get(job_id)
        return job if job is not None and job.owner == owner else None

    def jobs(self, *, owner):
        return [job for job in self._jobs.values() if job.owner == owner]

    def cancel(self, job_id, *, cause):
        job = self._jobs.get(job_id)
        if job is None or job.is_finished:
            return False
        self.cancel_causes[job_id] = cause
        self._tell("job_cancelled", cause=cause)
        if job in self._waiting:
            self._waiting.remove(job)
            self._finish(job, "cancelled")
        return True

    def forget(self, job_id):
        self._jobs.pop(job_id, None)

    def position(self, job):
        return self._waiting.index(job) + 1 if job in self._waiting else 0

    def eta_s(self, job):
        return None if job.is_finished else self.step_s * job.num_steps * (1 + self.position(job))

    def status(self):
        state = "busy" if self._running else "idle"
        worker = WorkerStatus(device="cpu", pid=None, state=state, num_restarts=0)
        is_ready = self.reason is None and not self.is_draining
        return EngineStatus(
            is_ready=is_ready,
            is_draining=self.is_draining,
            reason=self.reason or ("draining" if self.is_draining else None),
            workers=(worker,),
            num_queued=len(self._waiting),
            num_running=int(self._running is not None),
        )

    # ---- drawing --------------------------------------------------------------------------------

    async def _work(self):
        while True:
            while not self._waiting:
                self._wake.clear()
                await self._wake.wait()
            self._running = job = self._waiting.popleft()
            job.start()
            self._tell("job_started", queue_s=job.started_at - job.created_at)
            try:
                await self._draw(job)
            finally:
                self._running = None

    async def _draw(self, job):
        for notice in self.notices:
            job.notices.append(notice)
            job.emit("notice", {"message": notice})
        job.emit("stage", {"stage": "denoise"})
        for index, seed in enumerate(range(job.spec.seed, job.spec.seed + job.spec.num_images)):
            pixels = draw_gradient(job.spec.width, job.spec.height, seed)
            if not await self._denoise(job, index, pixels):
                if job.id not in self._lost:
                    return self._finish(job, "cancelled")
                self._lost.remove(job.id)
                job.retry()
                self._waiting.appendleft(job)
                return None
            if self.fail_next is not None:
                error, self.fail_next = self.fail_next, None
                return self._finish(job, "failed", error)
            image = JobImage(
                index=index,
                seed=seed,
                width=job.spec.width,
                height=job.spec.height,
                png=encode_png(pixels, job.spec, seed, self.capabilities.model),
                sha256=hashlib.sha256(pixels.tobytes()).hexdigest(),
            )
            job.images.append(image)
            self._tell("image", width=image.width, height=image.height)
            job.emit("image", {"index": index, "seed": seed, "sha256": image.sha256})
        return self._finish(job, "done")

    async def _denoise(self, job, index, pixels):
        """Whether it came to its end, uncancelled."""
        num_steps = job.num_steps
        wanted = min(job.spec.num_previews, num_steps)
        shown = {num_steps * (k + 1) // (wanted + 1) or 1 for k in range(wanted)}
        job.image_index = index
        for step in range(1, num_steps + 1):
            await self._until_allowed()
            await asyncio.sleep(self.step_s)
            if job.id in self.cancel_causes or job.id in self._lost:
                return False
            self.started_steps += 1
            job.step = step
            preview = _encoded(pixels[::2, ::2], "JPEG") if step in shown else None
            eta_s = self.step_s * (num_steps - step)
            job.emit(
                "step",
                {
                    "image": index,
                    "step": step,
                    "num_steps": num_steps,
                    "eta_s": eta_s,
                    "preview": preview,
                },
            )
            self._tell("step", duration_s=self.step_s)
        return True

    async def _until_allowed(self):
        while self._num_allowed == 0:
            self._allowed.clear()
            await self._allowed.wait()
        if self._num_allowed is not None:
            self._num_allowed -= 1

    def _finish(self, job, state, error=None):
        job.finish(state, error)
        self._tell(
            "job_finished",
            api=job.api,
            state=state,
            duration_s=job.finished_at - job.created_at,
            code=None if error is None else error.code,
        )

    def _tell(self, name, **facts):
        for observer in self.on_event:
            observer(name, **facts)


class FakeSupervisor:
    """A worker of whose memory a plan is made; `fault` is what it answers the next time."""

    def __init__(self):
        self.fault = None
        self.budgets = []

    async def set_memory(self, vram):
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        self.budgets.append(vram)
        return fake_memory(vram)


def fake_memory(vram=None):
    """The plan for a device of 12 GB, of which 10 are free."""
    names = {"text": 3, "modulation": 3, "denoise": 5, "decode": 4}
    device_bytes = vram or 10 * 2**30
    return {
        "vram": vram,
        "device_bytes": device_bytes,
        "total_bytes": 12 * 2**30,
        "step_bytes": max(0, 8 * 2**30 - device_bytes),
        "plan": [{"name": name, "peak_bytes": size * 2**30} for name, size in names.items()],
    }


def planned_engine(num_workers=1):
    """A fake engine whose device has a plan for its memory."""
    engine = FakeEngine(capabilities=fake_capabilities(device="cuda:0", memory=fake_memory()))
    engine.supervisors = [FakeSupervisor() for _ in range(num_workers)]
    return engine


def _shutdown():
    return JobError(
        message="the server stopped before the job was done",
        hint="send it again",
        code="shutdown",
        status=503,
    )


def out_of_memory():
    """What a job ends in when the device's memory is too small for it."""
    return JobError(
        message="out of memory: 2.0 GB more were needed",
        hint="try a smaller size",
        code="out_of_memory",
        status=503,
    )


def image_file(width=64, height=64, *, form="PNG", mode="RGB", colour=None):
    """An uploaded picture, as bytes."""
    file = io.BytesIO()
    default = {"RGB": (200, 40, 40), "RGBA": (200, 40, 40, 255), "L": 255}[mode]
    Image.new(mode, (width, height), colour if colour is not None else default).save(file, form)
    return file.getvalue()


def wait_until(condition, timeout_s=20.0):
    """Return when `condition()` is true; fail when it does not become so in time."""
    deadline = time.monotonic() + timeout_s
    for _ in itertools.count():
        if condition():
            return
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
