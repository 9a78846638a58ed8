"""Alive, ready, started? What probes and load balancers ask, without a key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Response

from flux_nf4.server.problems import Json

if TYPE_CHECKING:
    from flux_nf4.server.context import Context

_ANSWERS: dict[int | str, dict[str, Any]] = {503: {"description": "Not now; `reason` says why"}}


def router(context: Context) -> APIRouter:
    """`/livez`, `/readyz` and its alias `/health`, `/startupz`."""
    routes = APIRouter(tags=["Health"])

    @routes.get("/livez")
    async def live() -> Response:
        """200 while the server answers at all; what its workers do is no matter."""
        return Json({"status": "ok"})

    async def ready() -> Response:
        """200 while jobs are taken and drawn, 503 with a reason otherwise."""
        status = context.engine.status()
        body = {
            "status": "ok" if status.is_ready else "unavailable",
            "reason": status.reason,
            "num_queued": status.num_queued,
            "num_running": status.num_running,
        }
        return Json(body, status_code=200 if status.is_ready else 503)

    routes.get("/readyz", responses=_ANSWERS)(ready)
    routes.get("/health", responses=_ANSWERS)(ready)

    @routes.get("/startupz", responses=_ANSWERS)
    async def started() -> Response:
        """200 once the model has been loaded; until then the state of each worker."""
        status = context.engine.status()
        has_started = context.engine.capabilities is not None
        workers = [
            {"device": each.device, "state": each.state, "num_restarts": each.num_restarts}
            for each in status.workers
        ]
        body = {"status": "ok" if has_started else "starting", "workers": workers}
        return Json(body, status_code=200 if has_started else 503)

    return routes
