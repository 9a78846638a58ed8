"""Routes whose bodies may be large: they are parsed while the event loop goes on."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.routing import APIRoute

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from starlette.responses import Response

_LONGEST_NUMBER = 400  # digits; beyond 308 before its point a double is infinite


class Route(APIRoute):
    """A route of FastAPI's that parses JSON in a thread.

    An image of 24 MB in base64 takes 40 ms; what would take longer the gate has refused.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, given a request that parses itself in a thread."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_PatientRequest(request.scope, request.receive))

        return handle


class _PatientRequest(Request):
    async def json(self) -> Any:
        return await asyncio.to_thread(
            json.loads,
            await self.body(),
            parse_int=lambda text: int(_short(text)),
            parse_float=lambda text: float(_short(text)),
        )


def _short(number: str) -> str:
    if len(number) > _LONGEST_NUMBER:
        raise json.JSONDecodeError(f"a number of {len(number)} characters", "", 0)
    return number
