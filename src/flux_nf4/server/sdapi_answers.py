"""What A1111's clients are told: finished images, and progress on the way to them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flux_nf4 import __version__
from flux_nf4.pipeline.image_header import PARAMETERS_KEY
from flux_nf4.pipeline.image_metadata import SETTINGS_KEY, read_image
from flux_nf4.server import images

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from flux_nf4.server.context import Context
    from flux_nf4.server.images import ImageFormat
    from flux_nf4.server.jobs import Job

_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")


@dataclass(eq=False, slots=True)
class Watched:
    """A job that a caller waits for, and the newest picture of it."""

    job: Job
    preview: bytes | None = None

    async def follow(self) -> None:
        """Keep the newest preview until the job ends."""
        async for event in self.job.events():
            self.preview = event.data.get("preview") or self.preview


@dataclass(eq=False, slots=True)
class Callers:
    """The jobs that are on their way, by caller, in the order of their submission."""

    jobs: dict[str, list[Watched]] = field(default_factory=dict)

    def current(self, caller: str) -> Watched | None:
        """The one that is drawn, or will be first."""
        return next(iter(self.jobs.get(caller, ())), None)

    @contextlib.asynccontextmanager
    async def watching(self, caller: str, watched: Watched) -> AsyncIterator[None]:
        """List a job, and follow it, for the time of the block."""
        following = asyncio.create_task(watched.follow())
        self.jobs.setdefault(caller, []).append(watched)
        try:
            yield
        finally:
            self.jobs[caller].remove(watched)
            if not self.jobs[caller]:
                del self.jobs[caller]
            following.cancel()


def image_info(data: bytes) -> dict[str, Any]:
    """What `png-info` tells of an image file.

    Raises:
        FormatError: the settings in it are damaged.
    """
    record = read_image(data)
    items = {PARAMETERS_KEY: record.parameters} if record.parameters else {}
    if record.settings is not None:
        items[SETTINGS_KEY] = record.settings.to_json()
    pairs = dict(record.pairs)
    if size := _SIZE.fullmatch(pairs.get("Size", "")):
        pairs |= {"Size-1": size[1], "Size-2": size[2]}
    return {"info": record.parameters, "items": items, "parameters": pairs}


def answer(
    context: Context, job: Job, form: ImageFormat, quality: int | None, warnings: list[str]
) -> dict[str, Any]:
    """The images of a finished job in base64, and `info`; work for a thread."""
    encoded = [images.transcode(image.png, form, quality) for image in job.images]
    texts = [read_image(image.png).parameters for image in job.images]
    return {
        "images": [base64.b64encode(data).decode() for data in encoded],
        "info": json.dumps(_info(context, job, texts) | {"warnings": warnings}),
    }


def _info(context: Context, job: Job, texts: list[str]) -> dict[str, Any]:
    """What A1111 tells of its images; its clients read it, as JSON inside of JSON."""
    spec = job.spec
    seeds = [image.seed for image in job.images]
    return {
        "prompt": spec.prompt,
        "all_prompts": [spec.prompt] * len(seeds),
        "negative_prompt": spec.negative_prompt,
        "all_negative_prompts": [spec.negative_prompt] * len(seeds),
        "seed": spec.seed,
        "all_seeds": seeds,
        "subseed": spec.seed,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": spec.width,
        "height": spec.height,
        "sampler_name": "Euler",
        "cfg_scale": spec.guidance_scale,
        "distilled_cfg_scale": spec.distilled_guidance_scale,
        "steps": spec.num_inference_steps,
        "batch_size": 1,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": context.model_names[0],
        "sd_model_hash": None,
        "denoising_strength": None if spec.image is None else spec.strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": _timestamp(job.created_at),
        "clip_skip": 1,
        "version": f"flux-nf4 {__version__}",
    }


def progress(context: Context, watched: Watched | None, *, with_image: bool) -> dict[str, Any]:
    """How far a job has come; None is idle, which clients wait for: 0.0 and no jobs."""
    state: dict[str, Any] = {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "",
        "job_count": 0,
        "job_timestamp": "0",
        "job_no": 0,
        "sampling_step": 0,
        "sampling_steps": 0,
    }
    told: dict[str, Any] = {"progress": 0.0, "eta_relative": 0.0, "state": state}
    told |= {"current_image": None, "textinfo": None, "current_task": None}
    if watched is None:
        return told
    job = watched.job
    state |= {
        "job": "txt2img" if job.spec.image is None else "img2img",
        "job_count": job.spec.num_images,
        "job_timestamp": _timestamp(job.created_at),
        "job_no": len(job.images),
        "sampling_step": job.step,
        "sampling_steps": job.num_steps,
    }
    place = context.engine.position(job)
    if watched.preview is not None and with_image:
        told["current_image"] = base64.b64encode(watched.preview).decode()
    return told | {
        "progress": float(job.progress),
        "eta_relative": context.engine.eta_s(job) or 0.0,
        "textinfo": f"place {place} in the queue" if place else None,
        "current_task": job.id,
    }


def _timestamp(time_s: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.localtime(time_s))
