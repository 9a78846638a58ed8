"""The application: every router behind the gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from flux_nf4 import __version__
from flux_nf4.server import (
    capabilities,
    docs,
    health,
    memory,
    metrics,
    native_api,
    openai_api,
    page,
    problems,
    sdapi,
)
from flux_nf4.server.context import Context
from flux_nf4.server.gate import Gate
from flux_nf4.server.logs import AccessLog
from flux_nf4.server.problems import Json
from flux_nf4.server.schemas import ErrorAnswer

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from flux_nf4.server.engine import Engine
    from flux_nf4.server.settings import ServeSettings


class Application(FastAPI):
    """FastAPI behind the gate, which even its own error page must pass."""

    def __init__(self, settings: ServeSettings, **more: Any) -> None:
        super().__init__(**more)
        self._settings = settings

    def build_middleware_stack(self) -> ASGIApp:
        """The gate outermost, but for the log."""
        return AccessLog(Gate(super().build_middleware_stack(), self._settings))


def build_app(settings: ServeSettings, engine: Engine) -> FastAPI:
    """The server as an ASGI application; whoever runs it starts and stops the engine."""
    app = Application(
        settings,
        title="flux-nf4",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        default_response_class=Json,
        responses={"default": {"model": ErrorAnswer, "description": "Any other answer"}},
        redirect_slashes=False,
    )
    problems.install(app)
    context = Context(settings=settings, engine=engine)
    for part in (health, metrics, openai_api, native_api, capabilities, memory, sdapi, page):
        app.include_router(part.router(context))
    app.include_router(docs.router(app))
    return app
