"""The gate: what every request passes before a route sees it, and every answer on its way out.

Plain ASGI, outside of everything else, so that no answer leaves without its headers. A body is
read here, whole, with its bytes counted and its time limited; a request without a key is answered
before that.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response

from flux_nf4.server import security
from flux_nf4.server.problems import ApiError, retry_after

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from flux_nf4.server.settings import ServeSettings

_DISCARD_S = 1.0
_REQUEST_ID = re.compile(r"[\w.-]{1,64}")
_IMAGES = ("image/png", "image/jpeg", "image/webp", "application/octet-stream")
# Where something other than JSON is taken.
_CONTENT_TYPES = {
    "/v1/images/edits": ("multipart/form-data",),
    "/v1/image-info": _IMAGES,
}
# What parts JSON into values: a body of nothing else takes a second to parse, and gigabytes.
_MAX_MARKS = 10_000
_NO_MARKS = bytes(set(range(256)) - set(b",:[{"))
# Where images may come along, in base64 or as they are.
_UPLOAD_PATHS = frozenset(
    {
        "/v1/jobs",
        "/v1/images/edits",
        "/v1/image-info",
        "/sdapi/v1/img2img",
        "/sdapi/v1/txt2img",
        "/sdapi/v1/png-info",
    }
)


class Gate:
    """Wraps an application in the rules of `security` and the limits on bodies."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app = app
        self._settings = settings
        self._keys = security.KeyRing(settings.api_keys)
        self._num_buffered_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        added = security.SECURITY_HEADERS | {"x-request-id": request_id}
        added |= security.cors_headers(self._settings, headers)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = MutableHeaders(scope=message)
                for name, value in added.items():
                    own.setdefault(name, value)
            await send(message)

        is_read = False

        async def receive_part() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = not message.get("more_body", False)
            return message

        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["owner"] = security.LOCAL_OWNER
        try:
            answer = self._check(scope, headers)
            body = b"" if answer else await self._read_body(scope["path"], receive_part)
        except ApiError as error:
            answer, body = error.response(scope["path"]), b""
            if not is_read and ("expect" in headers or not await self._discard(receive)):
                # What is left of the body is not read, so the connection cannot be used again.
                answer.headers["connection"] = "close"
        if answer is not None:
            await answer(scope, receive, send_with_headers)
        elif body is not None:
            try:
                await self._app(scope, _replay(body, receive), send_with_headers)
            finally:
                self._num_buffered_bytes -= len(body)

    def _check(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to a preflight, None for a request that may pass.

        Raises:
            ApiError: it may not.
        """
        settings, method, path = self._settings, scope["method"], scope["path"]
        security.check_host(settings, headers.get("host", ""))
        if method == "OPTIONS":
            return Response(status_code=204, headers=security.preflight_headers(settings, headers))
        security.check_origin(settings, method, headers)
        scope["state"]["owner"] = self._keys.owner(path, headers)
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers or length != "0":
            _check_content_type(path, headers.get("content-type", ""))
        if not length.isdecimal() or int(length) > self._limit(path):
            raise _too_large(self._limit(path))
        return None

    def _limit(self, path: str) -> int:
        settings = self._settings
        return settings.max_upload_bytes if path in _UPLOAD_PATHS else settings.max_json_bytes

    async def _read_body(self, path: str, receive: Receive) -> bytes | None:
        """The whole body, which counts until it is given back; None when the client left.

        Raises:
            ApiError: 408, 413 or 503: it is too slow, too large, or one of too many.
        """
        body, limit, num_marks, is_whole = bytearray(), self._limit(path), 0, False
        timeout_s = self._settings.body_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    self._num_buffered_bytes += len(message.get("body", b""))
                    if len(body) > limit:
                        raise _too_large(limit)
                    if path not in _CONTENT_TYPES:
                        num_marks += len(message.get("body", b"").translate(None, _NO_MARKS))
                    if num_marks > _MAX_MARKS:
                        raise ApiError(
                            413,
                            f"the body has more than {_MAX_MARKS} commas, colons and brackets",
                            code="too_large",
                        )
                    if self._num_buffered_bytes > self._settings.max_buffered_bytes:
                        raise ApiError(
                            503, "too many uploads at once", code="busy", headers=retry_after(2)
                        )
                    if not message.get("more_body", False):
                        is_whole = True
                        return bytes(body)
        except TimeoutError as error:
            raise ApiError(
                408,
                f"the body did not arrive within {timeout_s:g} s",
                code="body_timeout",
                headers={"x-should-retry": "false"},
            ) from error
        finally:
            if not is_whole:
                self._num_buffered_bytes -= len(body)

    async def _discard(self, receive: Receive) -> bool:
        """Read what is left of a refused body, for a moment; whether that was all.

        Most clients read no answer before they have sent everything.
        """
        num_left = self._settings.max_upload_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_S):
                while num_left >= 0:
                    message = await receive()
                    if not message.get("more_body", False):
                        return True
                    num_left -= len(message["body"])
        return False


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` as if the body were still to come: what follows it is the real one's."""
    is_sent = False

    async def replay() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the body has more than {limit} bytes, the most for this route", code="too_large"
    )


def _check_content_type(path: str, content_type: str) -> None:
    kind = content_type.partition(";")[0].strip().lower()
    wanted = _CONTENT_TYPES.get(path, ("application/json",))
    if kind not in wanted:
        raise ApiError(
            415,
            f"the content type must be {' or '.join(f'`{each}`' for each in wanted)}, "
            f"got `{kind[:60]}`",
            code="unsupported_content_type",
        )
