"""The OpenAI Images API: what its clients send, and what they read.

Facts from openai-python 3.54 (`types/image_*`): field names, events, the meaning of a mask.
`guidance_scale` is FLUX's distilled guidance here and `true_cfg_scale` true guidance, as SGLang
and vLLM-Omni call them.
"""

from __future__ import annotations

import asyncio
import base64
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from flux_nf4.errors import InputError
from flux_nf4.pipeline.limits import MAX_SIZE, MIN_SIZE, PIXELS_PER_TOKEN
from flux_nf4.server import images
from flux_nf4.server.context import Context, owner_of, random_seed, require_done
from flux_nf4.server.jobs import JobSpec
from flux_nf4.server.openai_edits import EDIT_BODY, Upload, read_edit
from flux_nf4.server.pictures import picture
from flux_nf4.server.problems import ApiError, Json
from flux_nf4.server.schemas import ImageRequest
from flux_nf4.server.settings import QUALITY_STEPS
from flux_nf4.server.sse import EventStream, frame

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from flux_nf4.server.jobs import Job, JobImage

_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
_MAX_ASPECT = 3
_QUALITY_NAMES = {"standard": "medium", "hd": "high"}  # OpenAI's older words
_IMAGES_OR_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Images; with `stream`, events", "content": {"text/event-stream": {}}}
}
_EXTENSIONS = {
    "num_inference_steps": "num_inference_steps",
    "guidance_scale": "distilled_guidance_scale",
    "true_cfg_scale": "guidance_scale",
    "negative_prompt": "negative_prompt",
    "strength": "strength",
}


def router(context: Context) -> APIRouter:
    """`/v1/images/generations`, `/v1/images/edits`, `/v1/models`, and the links to images."""
    routes = APIRouter(tags=["OpenAI"])
    created = int(time.time())

    def model_as_json(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "flux-nf4",
            "license": context.capabilities.licence,
        }

    @routes.get("/v1/models")
    async def list_models() -> Response:
        """The model, once under each of its names."""
        data = [model_as_json(name) for name in context.model_names]
        return Json({"object": "list", "data": data})

    @routes.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        """The model under one of its names."""
        if name not in context.model_names:
            raise _unknown_model(name)
        return Json(model_as_json(name))

    @routes.post("/v1/images/generations", responses=_IMAGES_OR_EVENTS)
    async def generate(body: ImageRequest, request: Request) -> Response:
        """Draw images; the answer comes when they are done, or as events with `stream`."""
        return await _answer(context, request, body, None)

    @routes.post("/v1/images/edits", openapi_extra=EDIT_BODY, responses=_IMAGES_OR_EVENTS)
    async def edit(request: Request) -> Response:
        """Draw from an image, all of it or what a mask shows (transparent: drawn anew)."""
        body, upload = await read_edit(context, request)
        return await _answer(context, request, body, upload)

    @routes.get("/v1/files/{token}", response_class=Response)
    async def get_file(token: str) -> Response:
        """An image by a link from `response_format: url`; it works without a key for a while."""
        job_id, owner, index, form, quality = context.links.read(token)
        job = context.find_job(job_id, owner=owner)
        return await picture(job, index, form, quality)

    return routes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """A request that has become a job, and how it wants its images."""

    context: Context
    body: ImageRequest
    job: Job
    kind: str  # what its events begin with
    base_url: str

    @property
    def form(self) -> images.ImageFormat:
        return self.body.output_format or "png"

    @property
    def size(self) -> str:
        return f"{self.job.spec.width}x{self.job.spec.height}"

    @property
    def quality(self) -> str:
        """OpenAI's word nearest to the number of steps."""
        num_steps = self.job.spec.num_inference_steps
        return min(QUALITY_STEPS, key=lambda name: abs(QUALITY_STEPS[name] - num_steps))

    async def encoded(self, image: JobImage) -> str:
        data = await asyncio.to_thread(
            images.transcode, image.png, self.form, self.body.output_compression
        )
        return base64.b64encode(data).decode()

    def link(self, image: JobImage) -> str:
        parts = (self.job.id, self.job.owner, image.index, self.form, self.body.output_compression)
        lifetime_s = self.context.settings.link_lifetime_s
        token = self.context.links.sign(parts, lifetime_s=lifetime_s)
        return f"{self.base_url}v1/files/{token}"

    def usage(self, num_images: int) -> dict[str, Any]:
        """Tokens as FLUX counts them: the text is padded to as many as its encoder reads."""
        spec = self.job.spec
        per_image = spec.width * spec.height // PIXELS_PER_TOKEN**2
        text = self.context.capabilities.max_sequence_length
        seen = 0 if spec.image is None else per_image
        return {
            "input_tokens": text + seen,
            "output_tokens": num_images * per_image,
            "total_tokens": text + seen + num_images * per_image,
            "input_tokens_details": {"text_tokens": text, "image_tokens": seen},
        }

    def reply(self, data: list[dict[str, Any]]) -> dict[str, Any]:
        job, spec = self.job, self.job.spec
        assert job.started_at is not None
        assert job.finished_at is not None
        identifier = self.body.safety_identifier or self.body.user
        return {
            "created": int(job.created_at),
            "background": "opaque",
            "output_format": self.form,
            "quality": self.quality,
            "size": self.size,
            "data": data,
            "usage": self.usage(len(data)),
            "model": self.context.model_names[0],
            "seed": spec.seed,
            "metadata": {
                "num_inference_steps": spec.num_inference_steps,
                "guidance_scale": spec.distilled_guidance_scale,
                "true_cfg_scale": spec.guidance_scale,
                "negative_prompt": spec.negative_prompt,
            },
            "metrics": {
                "queue_s": job.started_at - job.created_at,
                "run_s": job.finished_at - job.started_at,
            },
            "warnings": job.notices,
            "x_prompt_truncated": any("tokens; not read" in notice for notice in job.notices),
            **({"safety_identifier": identifier} if identifier else {}),
        }


async def _answer(
    context: Context, request: Request, body: ImageRequest, upload: Upload | None
) -> Response:
    spec = _spec(context, body, upload)
    job = context.submit(spec, owner=owner_of(request), api="openai")
    order = _Order(
        context=context,
        body=body,
        job=job,
        kind="image_generation" if upload is None else "image_edit",
        base_url=str(request.base_url),
    )
    if body.stream:
        return EventStream(
            _events(order),
            keep_alive_s=context.settings.keep_alive_s,
            on_end=lambda: context.engine.cancel(job.id, cause="disconnect"),
        )
    await context.finish(job, request)
    data = []
    for image in job.images:
        if body.response_format == "url":
            shown = {"url": order.link(image)}
        else:
            shown = {"b64_json": await order.encoded(image)}
        data.append(shown | {"seed": image.seed, "sha256": image.sha256})
    return Json(order.reply(data))


async def _events(order: _Order) -> AsyncIterator[bytes]:
    """Partial images while it is drawn, each image when it is done, or an error."""
    job, num_partial = order.job, 0
    is_sent: set[int] = set()
    common = {
        "created_at": int(job.created_at),
        "size": order.size,
        "quality": order.quality,
        "background": "opaque",
    }
    async for event in job.events():
        if event.kind == "step" and event.data.get("preview") is not None:
            kind = f"{order.kind}.partial_image"
            data = {
                "type": kind,
                "b64_json": base64.b64encode(event.data["preview"]).decode(),
                "partial_image_index": num_partial,
                "output_format": "jpeg",  # what a preview is, whatever the image will be
                "image_index": event.data["image"],
            }
            num_partial += 1
            yield frame(common | data, event=kind)
        elif event.kind == "image" and event.data["index"] not in is_sent:
            # A job that is drawn again, as its worker died, has the same images once more.
            image = next((each for each in job.images if each.index == event.data["index"]), None)
            if image is None:
                continue
            is_sent.add(image.index)
            num_partial = 0
            kind = f"{order.kind}.completed"
            data = {
                "type": kind,
                "b64_json": await order.encoded(image),
                "output_format": order.form,
                "usage": order.usage(1),
                "seed": image.seed,
                "image_index": image.index,
                "warnings": job.notices,
            }
            yield frame(common | data, event=kind)
    try:
        require_done(job)
    except ApiError as error:
        yield frame(error.body, event="error")


def _spec(context: Context, body: ImageRequest, upload: Upload | None) -> JobSpec:
    model = context.capabilities
    if not body.prompt.strip():
        raise InputError("`prompt` is empty")
    if context.settings.strict_model and body.model not in (None, *context.model_names):
        raise _unknown_model(str(body.model))
    width, height = _size(context, body, upload)
    given = body.model_dump()
    values = {
        ours: given[theirs] for theirs, ours in _EXTENSIONS.items() if given.get(theirs) is not None
    }
    values.setdefault("num_inference_steps", _num_steps(body.quality, model.default_steps))
    try:
        return JobSpec(
            prompt=body.prompt,
            width=width,
            height=height,
            seed=random_seed() if body.seed in (None, -1) else body.seed,
            num_images=body.n or 1,
            num_previews=(body.partial_images or 0) if body.stream else 0,
            image=None if upload is None else upload.image.data,
            mask_image=None if upload is None else upload.mask_image,
            **values,
        )
    except InputError as error:
        raise _in_their_words(error) from error


def _in_their_words(error: InputError) -> InputError:
    for theirs, ours in _EXTENSIONS.items():
        if error.message.startswith(f"`{ours}`"):
            return InputError(f"`{theirs}`{error.message[len(ours) + 2 :]}", hint=error.hint)
    return error


def _num_steps(quality: str | None, default_steps: int) -> int:
    """A model that was distilled for a few steps takes those, whatever the quality."""
    if quality in (None, "auto") or default_steps < QUALITY_STEPS["low"]:
        return default_steps
    assert quality is not None
    return QUALITY_STEPS[_QUALITY_NAMES.get(quality, quality)]


def _size(context: Context, body: ImageRequest, upload: Upload | None) -> tuple[int, int]:
    model = context.capabilities
    default = (model.default_width, model.default_height)
    if body.size in (None, "auto"):
        if upload is not None:
            area = default[0] * default[1]
            image = upload.image
            default = nearest_size(image.width, image.height, max_pixels=area, fill=True)
        width, height = default
        return (
            width if body.width is None else body.width,
            height if body.height is None else body.height,
        )
    assert body.size is not None
    if body.width is not None or body.height is not None:
        raise InputError("`size` and `width` or `height` cannot both be given")
    match = _SIZE.fullmatch(body.size)
    if match is None:
        raise InputError(f"`size` must be `auto` or like `1024x1024`, got `{body.size[:40]}`")
    width, height = int(match.group(1)), int(match.group(2))
    nearest = nearest_size(width, height, max_pixels=context.settings.max_pixels)
    if nearest != (width, height):
        raise InputError(
            f"`size` {body.size} cannot be drawn: sides are multiples of {PIXELS_PER_TOKEN} from "
            f"{MIN_SIZE} to {MAX_SIZE}, from 1:{_MAX_ASPECT} to {_MAX_ASPECT}:1, with at most "
            f"{context.settings.max_pixels} pixels",
            hint=f"the nearest is {nearest[0]}x{nearest[1]}",
        )
    return nearest


def nearest_size(
    width: int, height: int, *, max_pixels: int, fill: bool = False
) -> tuple[int, int]:
    """The legal size nearest to one asked for; with `fill`, one of about `max_pixels`.

    Legal: OpenAI's rule (multiples of 16, from 1:3 to 3:1) within the model's limits.
    """
    width, height = min(width, _MAX_ASPECT * height), min(height, _MAX_ASPECT * width)
    too_large = width * height > max_pixels
    scale = (max_pixels / (width * height)) ** 0.5 if fill or too_large else 1.0
    rounding = int if too_large and not fill else round
    sides = [
        min(MAX_SIZE, max(MIN_SIZE, rounding(side * scale / PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN))
        for side in (width, height)
    ]
    longest = _MAX_ASPECT * min(sides)
    return min(sides[0], longest), min(sides[1], longest)


def _unknown_model(name: str) -> ApiError:
    return ApiError(
        404, f"there is no model `{name[:80]}` here", code="model_not_found", param="model"
    )
