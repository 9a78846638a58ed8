"""Server-sent events: frames, and an answer that knows when its reader has gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from starlette.types import Receive, Scope, Send

KEEP_ALIVE = b": keep-alive\n\n"
# A reader that takes nothing for this long, with its connection open, is given up.
_SEND_TIMEOUT_S = 60.0
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def frame(data: Mapping[str, Any], *, event: str | None = None, number: int | None = None) -> bytes:
    """One event; JSON in ASCII has no line breaks of its own."""
    lines = [] if number is None else [f"id: {number}"]
    lines += [] if event is None else [f"event: {event}"]
    lines.append(f"data: {json.dumps(data, allow_nan=False, separators=(',', ':'))}")
    return ("\n".join(lines) + "\n\n").encode()


class EventStream(Response):
    """Sends frames as they come, and a comment when none did for a while.

    `on_end` is called when the stream is over, whoever ended it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncIterator[bytes],
        *,
        keep_alive_s: float,
        on_end: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._frames = frames
        self._keep_alive_s = keep_alive_s
        self._on_end = on_end

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the frames end or the reader leaves."""
        sending = asyncio.ensure_future(self._send_all(send))
        leaving = asyncio.ensure_future(_until_disconnect(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._on_end()
            leaving.cancel()
            if not sending.done():
                sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, TimeoutError):
                await sending

    async def _send_all(self, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        async for part in _kept_alive(self._frames, self._keep_alive_s):
            async with asyncio.timeout(_SEND_TIMEOUT_S):
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _kept_alive(frames: AsyncIterator[bytes], keep_alive_s: float) -> AsyncIterator[bytes]:
    """The frames, and between them a comment whenever none came for `keep_alive_s`."""
    coming: asyncio.Future[bytes] | None = None
    try:
        while True:
            coming = asyncio.ensure_future(anext(frames, b""))
            while not (await asyncio.wait((coming,), timeout=keep_alive_s))[0]:
                yield KEEP_ALIVE
            if not coming.result():
                return
            yield coming.result()
    finally:
        if coming is not None:
            coming.cancel()


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
