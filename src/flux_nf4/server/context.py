"""What every route is given: the settings, the engine, and the rules that hold for all APIs."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flux_nf4.server.links import Links
from flux_nf4.server.logs import log_job
from flux_nf4.server.problems import ApiError, from_job, retry_after
from flux_nf4.server.rates import Rates

if TYPE_CHECKING:
    from starlette.requests import Request

    from flux_nf4.server.engine import Capabilities, Engine
    from flux_nf4.server.jobs import Api, Job, JobSpec
    from flux_nf4.server.settings import ServeSettings

_MEGA = 1_000_000
_LOADING_RETRY_S = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """One server."""

    settings: ServeSettings
    engine: Engine
    links: Links = field(default_factory=Links)
    rates: Rates = field(default_factory=Rates)

    def __post_init__(self) -> None:
        self.engine.on_event.append(self._on_event)

    @property
    def capabilities(self) -> Capabilities:
        """What the model can do.

        Raises:
            ApiError: 503, it is still loading.
        """
        if self.engine.capabilities is None:
            reason = self.engine.status().reason or "the model is loading"
            raise ApiError(503, reason, code="model_loading", headers=retry_after(_LOADING_RETRY_S))
        return self.engine.capabilities

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names under which the model is served; the first is told."""
        return self.settings.served_model_names or (self.capabilities.model,)

    def submit(self, spec: JobSpec, *, owner: str, api: Api) -> Job:
        """Hand a job to the engine if it is within the limits.

        Raises:
            ApiError: 400, it asks for more than a request may; 429, its owner for too much at once.
            QueueFullError, DrainingError: not now.
        """
        settings = self.settings
        pixels = spec.width * spec.height
        if pixels > settings.max_pixels:
            raise ApiError(
                400,
                f"`{spec.width}x{spec.height}` is {pixels / _MEGA:.1f} megapixels; this server "
                f"draws at most {settings.max_pixels / _MEGA:.1f}",
                code="too_many_pixels",
                param="size",
            )
        passes = 2 if spec.guidance_scale > 1 else 1
        work = spec.num_images * pixels * spec.num_inference_steps * passes / _MEGA
        if work > settings.max_megapixel_steps:
            raise ApiError(
                400,
                f"{work:.0f} megapixel steps (images x megapixels x steps, twice with true CFG) "
                f"are more than the {settings.max_megapixel_steps:.0f} that this server does",
                code="too_much_work",
                hint="ask for fewer images, fewer steps, or a smaller size",
            )
        try:
            self.rates.take(settings, owner, work)
        except ApiError:
            for tell in self.engine.on_event:
                tell("rejected", reason="rate_limit")
            raise
        job = self.engine.submit(spec, owner=owner, api=api)
        log_job(job, with_prompt=settings.log_prompts)
        return job

    def _on_event(self, _: str, *, job: Job | None = None, **__: object) -> None:
        # It was accepted just now, or by the server that was here before.
        if job is not None and self.settings.queue_timeout_s is not None:
            left_s = max(0, job.created_at + self.settings.queue_timeout_s - time.time())
            asyncio.get_running_loop().call_later(left_s, self._give_up, job)

    def _give_up(self, job: Job) -> None:
        if job.started_at is None:
            self.engine.cancel(job.id, cause="timeout")

    def find_job(self, job_id: str, *, owner: str) -> Job:
        """The owner's job.

        Raises:
            ApiError: 404, there is none, or it is another's.
        """
        job = self.engine.job(job_id, owner=owner)
        if job is None:
            raise ApiError(404, "there is no such job", code="job_not_found", param="job_id")
        return job

    async def finish(self, job: Job, request: Request) -> None:
        """Wait for a job's images; cancel it when the client goes away.

        Raises:
            ApiError: it failed, or was cancelled.
        """
        waiting = asyncio.ensure_future(job.wait())
        leaving = asyncio.ensure_future(until_disconnect(request))
        try:
            await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not job.is_finished:
                self.engine.cancel(job.id, cause="disconnect")
                await waiting
        finally:
            for task in (waiting, leaving):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await leaving
            self.engine.cancel(job.id, cause="disconnect")
        require_done(job)


async def until_disconnect(request: Request) -> None:
    """Return when the client has gone; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def require_done(job: Job) -> None:
    """Raises ApiError: the finished job has no images."""
    if job.error is not None:
        raise from_job(job.error)
    if job.state == "cancelled":
        raise ApiError(499, "the job was cancelled", code="cancelled")


def owner_of(request: Request) -> str:
    """Whose request it is: `local`, or a short hash of the key."""
    owner: str = request.state.owner
    return owner


def random_seed() -> int:
    """A seed for a request that gives none: 32 bits, which every client can read back."""
    return secrets.randbelow(2**32)
