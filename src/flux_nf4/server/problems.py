"""Every error as OpenAI's clients read it: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import logging
import math
import re
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from flux_nf4.errors import (
    Cancelled,
    DiskError,
    DoesNotFitError,
    FluxNF4Error,
    FormatError,
    InputError,
)
from flux_nf4.server.jobs import DrainingError, NotReadyError, QueueFullError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fastapi import FastAPI, Request

    from flux_nf4.server.jobs import JobError

NO_LORA = "this version serves no LoRA adapters"
# The longest that OpenAI's client waits; it takes a longer one for "do not retry".
MAX_RETRY_AFTER_S = 120
_LONGEST_QUOTE = 60
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}
_log = logging.getLogger(__name__)
_FIRST_NAME = re.compile(r"`([a-z_]+)`")


class Json(JSONResponse):
    """JSON in ASCII: half of a surrogate pair, quoted from a request, cannot be sent otherwise."""

    def render(self, content: Any) -> bytes:
        """The bytes of `content`."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


class ApiError(Exception):
    """An answer other than what was asked for; `param` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        hint: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if hint is None else f"{message}; {hint}"
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """What is sent, also as the last frame of a stream."""
        fallback = "invalid_request_error" if self.status < 500 else "server_error"
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, fallback),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self, path: str) -> Json:
        """It as the answer to a request for `path`."""
        # The clients of A1111 show what FastAPI calls `detail`.
        more = {"detail": self.message} if path.startswith("/sdapi/") else {}
        return Json(self.body | more, status_code=self.status, headers=self.headers)


def retry_after(seconds: float) -> dict[str, str]:
    """`Retry-After`, in whole seconds that OpenAI's client obeys."""
    return {"Retry-After": str(min(MAX_RETRY_AFTER_S, max(1, math.ceil(seconds))))}


def as_api_error(error: FluxNF4Error) -> ApiError:
    """Which answer one of our errors is."""
    if isinstance(error, QueueFullError):
        return ApiError(
            429, error.message, code="queue_full", headers=retry_after(error.retry_after_s)
        )
    if isinstance(error, DrainingError):
        headers = retry_after(5) | {"x-should-retry": "false"}
        return ApiError(503, error.message, code="draining", hint=error.hint, headers=headers)
    if isinstance(error, NotReadyError):
        return ApiError(503, error.message, code="not_ready", headers=retry_after(5))
    if isinstance(error, InputError):
        found = _FIRST_NAME.match(error.message)
        param = found.group(1) if found else None
        return ApiError(400, error.message, code="invalid_value", param=param, hint=error.hint)
    if isinstance(error, FormatError):
        return ApiError(400, error.message, code="invalid_file", hint=error.hint)
    if isinstance(error, DiskError):
        _log.error("%s", error.message)  # which names the file: no client's business
        message = "the server's disk is full, or cannot be written to"
        return ApiError(507, message, code="disk_full", headers={"x-should-retry": "false"})
    if isinstance(error, DoesNotFitError):
        return ApiError(503, error.message, code="out_of_memory", hint=error.hint)
    if isinstance(error, Cancelled):
        return ApiError(499, error.message, code="cancelled", hint=error.hint)
    return ApiError(500, error.message, code="internal_error", hint=error.hint)


def from_job(error: JobError) -> ApiError:
    """The answer for a job that failed.

    Clients try a 5xx again by themselves. That may help after a shutdown; anything else was tried
    twice already, or comes out the same.
    """
    headers = retry_after(5) if error.code == "shutdown" else {"x-should-retry": "false"}
    return ApiError(error.status, error.message, code=error.code, hint=error.hint, headers=headers)


def from_validation(errors: Sequence[Any]) -> ApiError:
    """The first of what pydantic found, with the field named and its value quoted."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(place) or None
    kind, said = first["type"], first["msg"][:1].lower() + first["msg"][1:]
    if param == "lora":
        return ApiError(400, NO_LORA, code="unsupported_value", param=param)
    if kind == "none_required":
        message = f"`{param}` is not supported"
        return ApiError(400, message, code="unsupported_value", param=param)
    if kind == "missing":
        message = f"`{param}` is missing" if param else "the request has no body"
        return ApiError(400, message, code="missing_required_parameter", param=param)
    if kind == "extra_forbidden":
        return ApiError(400, f"unknown field `{param}`", code="unknown_parameter", param=param)
    if kind == "json_invalid":
        detail = first.get("ctx", {}).get("error", said)
        return ApiError(400, f"the body is not JSON: {detail}", code="invalid_json")
    got = "" if isinstance(first["input"], dict | list) else f", got `{_quoted(first['input'])}`"
    name = f"`{param}`" if param else "the body"
    code = "unsupported_value" if kind == "literal_error" else "invalid_value"
    return ApiError(400, f"{name}: {said}{got}", code=code, param=param)


def _quoted(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= _LONGEST_QUOTE else f"{text[: _LONGEST_QUOTE - 3]}..."


def install(app: FastAPI) -> None:
    """Make every error that leaves `app` one of ours."""

    async def on_http_error(request: Request, error: HTTPException) -> Json:
        code = _CODES.get(error.status_code)
        message = {404: "there is no such route", 405: "this route takes other methods"}.get(
            error.status_code, str(error.detail)
        )
        own = ApiError(error.status_code, message, code=code, headers=error.headers)
        return own.response(request.scope["path"])

    async def on_api_error(request: Request, error: ApiError) -> Json:
        return error.response(request.scope["path"])

    async def on_own_error(request: Request, error: FluxNF4Error) -> Json:
        return as_api_error(error).response(request.scope["path"])

    async def on_validation_error(request: Request, error: RequestValidationError) -> Json:
        return from_validation(error.errors()).response(request.scope["path"])

    async def on_deep_body(request: Request, _: RecursionError) -> Json:
        # Parsed it was, but checking it or telling it back takes more calls than there may be.
        error = ApiError(400, "the body is nested too deep", code="invalid_json")
        return error.response(request.scope["path"])

    async def on_fault(request: Request, _: Exception) -> Json:
        message = "this is a bug in flux-nf4; the server's log has the details"
        return ApiError(500, message, code="internal_error").response(request.scope["path"])

    handlers: dict[Any, Any] = {
        HTTPException: on_http_error,
        ApiError: on_api_error,
        FluxNF4Error: on_own_error,
        RequestValidationError: on_validation_error,
        RecursionError: on_deep_body,
        Exception: on_fault,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
