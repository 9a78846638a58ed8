"""The native API: jobs that are submitted, watched and fetched.

The web page draws with nothing else. A job is its caller's own: for another key it does not exist.
"""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, cast

from fastapi import APIRouter, Query, Request, Response

from flux_nf4.server.context import Context, owner_of, random_seed
from flux_nf4.server.jobs import JobSpec
from flux_nf4.server.pictures import decode_upload, picture
from flux_nf4.server.problems import ApiError, Json, from_job
from flux_nf4.server.routing import Route
from flux_nf4.server.schemas import JobRequest
from flux_nf4.server.sse import EventStream, frame

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from flux_nf4.server.images import ImageFormat
    from flux_nf4.server.jobs import Job, JobEvent, JobImage

Answers: TypeAlias = dict[int | str, dict[str, Any]]

_IMAGE_NAME = re.compile(r"(\d{1,4})\.(png|jpeg|webp)")
_EVENTS: Answers = {200: {"description": "Events", "content": {"text/event-stream": {}}}}
_PICTURE: Answers = {
    200: {
        "description": "The image",
        "content": {f"image/{name}": {} for name in ("png", "jpeg", "webp")},
    }
}


def router(context: Context) -> APIRouter:
    """The routes under `/v1/jobs`."""
    routes = APIRouter(tags=["Native"], route_class=Route)

    @routes.post("/v1/jobs", status_code=202)
    async def submit(body: JobRequest, request: Request) -> Response:
        """Submit a job; it is drawn when its turn comes, whether or not you wait."""
        spec = await _spec(context, body)
        job = context.submit(spec, owner=owner_of(request), api="jobs")
        return Json(job_as_json(context, job), status_code=202)

    @routes.get("/v1/jobs")
    async def list_jobs(
        request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> Response:
        """Your jobs, newest first."""
        own = context.engine.jobs(owner=owner_of(request))
        data = [job_as_json(context, job) for job in own[::-1][:limit]]
        return Json({"object": "list", "data": data})

    @routes.get("/v1/jobs/{job_id}")
    async def get_job(job_id: str, request: Request) -> Response:
        """One job as it stands."""
        return Json(job_as_json(context, context.find_job(job_id, owner=owner_of(request))))

    @routes.post("/v1/jobs/{job_id}/cancel")
    async def cancel(job_id: str, request: Request) -> Response:
        """Stop a job at its next step; the images that it has stay."""
        job = context.find_job(job_id, owner=owner_of(request))
        context.engine.cancel(job.id, cause="client")
        return Json(job_as_json(context, job))

    @routes.delete("/v1/jobs/{job_id}")
    async def delete(job_id: str, request: Request) -> Response:
        """Stop a job; one that is finished is forgotten, with its images."""
        job = context.find_job(job_id, owner=owner_of(request))
        if not context.engine.cancel(job.id, cause="client"):
            context.engine.forget(job.id)
        return Json(job_as_json(context, job))

    @routes.get("/v1/jobs/{job_id}/events", response_class=Response, responses=_EVENTS)
    async def events(job_id: str, request: Request) -> Response:
        """Everything that happens to a job, from the beginning or from `Last-Event-ID` on."""
        job = context.find_job(job_id, owner=owner_of(request))
        last = request.headers.get("last-event-id", "0")
        after = int(last) if re.fullmatch(r"\d{1,9}", last) else 0
        return EventStream(_frames(context, job, after), keep_alive_s=context.settings.keep_alive_s)

    @routes.get("/v1/jobs/{job_id}/images/{name}", response_class=Response, responses=_PICTURE)
    async def get_image(job_id: str, name: str, request: Request) -> Response:
        """A finished image: `0.png`, `0.jpeg`, `0.webp`, ..."""
        job = context.find_job(job_id, owner=owner_of(request))
        index, form = _image_name(name)
        return await picture(job, index, form)

    return routes


def _image_name(name: str) -> tuple[int, ImageFormat]:
    match = _IMAGE_NAME.fullmatch(name)
    if match is None:
        raise ApiError(404, "images are named like `0.png`", code="image_not_found")
    return int(match.group(1)), cast("ImageFormat", match.group(2))


async def _spec(context: Context, body: JobRequest) -> JobSpec:
    model = context.capabilities
    given = {name: value for name, value in body.model_dump().items() if value is not None}
    for name in ("image", "mask_image"):
        if name in given:
            given[name] = (await decode_upload(context, name, given[name])).data
    defaults = {
        "width": model.default_width,
        "height": model.default_height,
        "num_inference_steps": model.default_steps,
        "seed": random_seed(),
    }
    return JobSpec(**(defaults | given))


def job_as_json(context: Context, job: Job) -> dict[str, Any]:
    """A job as the API tells it."""
    error = None
    if job.error is not None:
        error = from_job(job.error).body["error"] | {"hint": job.error.hint}
    return {
        "id": job.id,
        "object": "job",
        "state": job.state,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "position": context.engine.position(job),
        "eta_s": context.engine.eta_s(job),
        "progress": job.progress,
        "step": job.step,
        "num_steps": job.num_steps,
        "image_index": job.image_index,
        "request": job.spec.to_dict()
        | {"has_image": job.spec.image is not None, "has_mask": job.spec.mask_image is not None},
        "images": [_image_as_json(job, image) for image in job.images],
        "notices": job.notices,
        "error": error,
    }


def _image_as_json(job: Job, image: JobImage) -> dict[str, Any]:
    return {
        "index": image.index,
        "seed": image.seed,
        "width": image.width,
        "height": image.height,
        "sha256": image.sha256,
        "url": _url(job, image.index),
    }


def _url(job: Job, index: int) -> str:
    return f"/v1/jobs/{job.id}/images/{index}.png"


async def _frames(context: Context, job: Job, after: int) -> AsyncIterator[bytes]:
    async for event in job.events(after):
        yield frame(_event_data(context, job, event), event=event.kind, number=event.number)


def _event_data(context: Context, job: Job, event: JobEvent) -> dict[str, Any]:
    data = dict(event.data)
    if event.kind == "step":
        preview = data.pop("preview", None)
        if preview is not None:
            data["preview"] = "data:image/jpeg;base64," + base64.b64encode(preview).decode()
    elif event.kind == "image":
        data["url"] = _url(job, data["index"])
    elif event.kind in ("queued", "done", "failed", "cancelled"):
        data["job"] = job_as_json(context, job)
    return data
