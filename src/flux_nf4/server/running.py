"""A job in a worker's hands: its frames become events, and its pixels files.

Frames are handled one after the other, as they came, while the worker goes on: files are encoded
in threads, and a worker takes its next job when it has drawn this one, not when it is encoded.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from flux_nf4.pipeline.image_metadata import ImageSettings
from flux_nf4.server.images import encode_png, encode_preview
from flux_nf4.server.jobs import Job, JobError, JobImage

if TYPE_CHECKING:
    from collections.abc import Callable

    from flux_nf4.server.jobs import JobSpec
    from flux_nf4.server.pace import Pace
    from flux_nf4.server.status import Capabilities

CancelCause: TypeAlias = Literal["client", "disconnect", "timeout", "shutdown"]

ERROR_OF_FAULT = JobError(
    message="its image could not be made",
    hint="see the log of the server",
    code="internal_error",
    status=500,
)


class Running:
    """One attempt at a job. `is_drawing` until its worker is free again."""

    def __init__(
        self,
        job: Job,
        capabilities: Capabilities,
        pace: Pace,
        observe: Callable[..., None],
    ) -> None:
        self.job = job
        self.is_drawing = True
        self.cause: CancelCause | None = None
        self._capabilities = capabilities
        self._pace = pace
        self._observe = observe
        self._frames: asyncio.Queue[tuple[dict[str, Any], bytes]] = asyncio.Queue()
        self._has_preview = False
        self._stage = ""
        self._stage_began_s = self._came_s = time.monotonic()

    def put(self, frame: dict[str, Any], pixels: bytes) -> None:
        """A frame came from the worker."""
        before_s, self._came_s = self._came_s, time.monotonic()
        times = {"came_s": self._came_s, "duration_s": self._came_s - before_s}
        self._frames.put_nowait((frame | times, pixels))

    async def tell(self) -> dict[str, Any]:
        """Tell the job's readers of all frames to the last, which is returned."""
        while True:
            frame, pixels = await self._frames.get()
            match frame["kind"]:
                case "stage":
                    self._begin_stage(frame["stage"], frame["came_s"])
                case "step":
                    await self._tell_step(frame, pixels)
                case "notice":
                    if frame["is_oom"]:
                        self._observe("out_of_memory", stage=self._stage, action="shrunk")
                    self.job.notices.append(frame["message"])
                    self.job.emit("notice", {"message": frame["message"]})
                case "image":
                    await self._tell_image(frame, pixels)
                case last:
                    if last == "failed" and frame["error"]["code"] == "out_of_memory":
                        self._observe("out_of_memory", stage=self._stage, action="failed")
                    self._begin_stage("", frame["came_s"])
                    return frame

    def _begin_stage(self, stage: str, came_s: float) -> None:
        if self._stage:
            self._observe("stage", stage=self._stage, duration_s=came_s - self._stage_began_s)
        self._stage, self._stage_began_s = stage, came_s
        if stage:
            self.job.emit("stage", {"stage": stage})

    async def _tell_step(self, frame: dict[str, Any], pixels: bytes) -> None:
        job = self.job
        self._pace.learn(job.spec, frame["duration_s"])
        self._observe("step", duration_s=frame["duration_s"])
        preview = None
        if pixels:
            size = frame["preview"]["width"], frame["preview"]["height"]
            preview = await asyncio.to_thread(encode_preview, pixels, *size)
            if not self._has_preview:
                self._has_preview = True
                self._observe("first_preview", duration_s=time.time() - job.created_at)
        job.image_index = len(job.images)
        job.step, job.num_steps = frame["step"], frame["num_steps"]
        data = {"image": job.image_index, "step": job.step, "num_steps": job.num_steps}
        job.emit("step", data | {"eta_s": self._pace.remaining_s(job), "preview": preview})

    async def _tell_image(self, frame: dict[str, Any], pixels: bytes) -> None:
        began_s = time.monotonic()
        image = await asyncio.to_thread(self._encode, frame, pixels)
        self._observe("stage", stage="save", duration_s=time.monotonic() - began_s)
        self._observe("image", width=image.width, height=image.height)
        self.job.images.append(image)
        self.job.emit("image", {"index": image.index, "seed": image.seed, "sha256": image.sha256})

    def _encode(self, frame: dict[str, Any], pixels: bytes) -> JobImage:
        size = frame["width"], frame["height"]
        settings = image_settings(self.job.spec, self._capabilities, frame["seed"])
        return JobImage(
            index=frame["index"],
            seed=frame["seed"],
            width=size[0],
            height=size[1],
            png=encode_png(pixels, *size, settings),
            sha256=hashlib.sha256(pixels).hexdigest(),
        )


def image_settings(spec: JobSpec, capabilities: Capabilities, seed: int) -> ImageSettings:
    """What an image of a job says of its making."""
    return ImageSettings(
        prompt=spec.prompt,
        negative_prompt=spec.negative_prompt,
        width=spec.width,
        height=spec.height,
        num_inference_steps=spec.num_inference_steps,
        guidance_scale=spec.guidance_scale,
        distilled_guidance_scale=(
            spec.distilled_guidance_scale if capabilities.embeds_guidance else None
        ),
        seed=seed,
        schedule=spec.schedule,
        strength=None if spec.image is None else spec.strength,
        max_sequence_length=capabilities.max_sequence_length,
        model=capabilities.model,
        quantization=capabilities.quantization,
        dtype=capabilities.dtype,
    )


def error_of_cancel(cause: CancelCause, *, is_kept: bool) -> JobError | None:
    """What a client is told of a job that was stopped; None if he stopped it himself."""
    if cause == "timeout":
        return JobError(
            message="the job waited for its turn longer than it may",
            hint="send it again when the server has less to do",
            code="timeout",
            status=503,
        )
    if cause == "shutdown":
        return JobError(
            message="the server stopped before the job was done",
            hint="it goes on when the server is back" if is_kept else "send it again",
            code="shutdown",
            status=503,
        )
    return None


def error_of_loss(reason: str) -> JobError:
    """What a client is told of a job whose worker died each time."""
    return JobError(
        message=f"what drew it was lost each time; the last time: {reason}",
        hint="the log of the server says more; a smaller size may help",
        code="worker_lost",
        status=500,
    )
