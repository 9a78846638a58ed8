"""The memory setting: another budget for every worker, without a restart of the server."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Response

from flux_nf4.errors import DoesNotFitError
from flux_nf4.memory.amounts import parse_limit
from flux_nf4.server.problems import ApiError, Json
from flux_nf4.server.schemas import MemoryRequest

if TYPE_CHECKING:
    from flux_nf4.server.context import Context
    from flux_nf4.server.engine import Engine


def router(context: Context) -> APIRouter:
    """`/v1/memory`."""
    routes = APIRouter(tags=["Native"])
    one_at_a_time = asyncio.Lock()

    @routes.put("/v1/memory")
    async def set_memory(body: MemoryRequest) -> Response:
        """Give the workers another budget of device memory, from the next request's images on.

        The answer is the new plan, as in `/v1/capabilities`. It lasts until the server ends.
        """
        vram = parse_limit(body.vram, "vram")
        _check(context)
        try:
            async with one_at_a_time:
                return Json(await _change(context.engine, vram))
        except DoesNotFitError as error:
            raise ApiError(
                400, error.message, code="does_not_fit", param="vram", hint=error.hint
            ) from error

    return routes


def may_be_set(context: Context) -> bool:
    """Whether a client may change the setting, and there is one."""
    engine, is_planned = context.engine, context.capabilities.memory is not None
    return context.settings.lets_memory_change and bool(engine.supervisors) and is_planned


def _check(context: Context) -> None:
    """Raises ApiError: 403 or 409, the setting is not the caller's to change, or there is none."""
    if not context.settings.lets_memory_change:
        raise ApiError(
            403,
            "the memory of this server is its operator's to set",
            code="memory_locked",
            hint="`--vram` sets it when the server starts",
        )
    if not may_be_set(context):
        reason = f"on `{context.capabilities.device}` no memory is planned"
        if not context.engine.supervisors:
            reason = "replicas of a cluster are told their memory when they start"
        raise ApiError(409, reason, code="memory_not_planned")


async def _change(engine: Engine, vram: int | None) -> dict[str, Any]:
    """All workers, or none -> the plan of the first.

    Raises:
        DoesNotFitError: no plan fits.
        InputError: the device does not tell how much is free.
        NotReadyError: a worker is on its way, or was lost.
    """
    workers = engine.supervisors
    answers = await asyncio.gather(
        *(worker.set_memory(vram) for worker in workers), return_exceptions=True
    )
    faults = [answer for answer in answers if isinstance(answer, BaseException)]
    if faults:
        changed = (
            worker
            for worker, answer in zip(workers, answers, strict=True)
            if not isinstance(answer, BaseException)
        )
        before = (worker.set_memory(engine.settings.vram) for worker in changed)
        await asyncio.gather(*before, return_exceptions=True)
        raise faults[0]
    plan = answers[0]
    assert isinstance(plan, dict)
    engine.settings = dataclasses.replace(engine.settings, vram=vram)
    if engine.capabilities is not None:
        engine.capabilities = dataclasses.replace(engine.capabilities, memory=plan)
    return plan
