"""Log lines: JSON for machines or text for people, with the request's id, without prompts or keys.

uvicorn's access log is off; `AccessLog` writes one line for each request instead, when it ends.
What a request carries is not in it but for the path: no header, no query, no body.
"""

from __future__ import annotations

import json
import logging
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from flux_nf4.server.jobs import Job

_LEVELS = {"": logging.WARNING, "flux_nf4": logging.INFO, "uvicorn": logging.WARNING}
# Asked every few seconds by machines; told only when the answer is no.
_PROBES = frozenset({"/livez", "/readyz", "/health", "/startupz", "/metrics"})
_CLIENT_LEFT = 499  # as nginx has it
_HIDDEN = "[key]"
_LINKS = "/v1/files/"

_log = logging.getLogger(__name__)
# A scope's `state` gets its `request_id` after this is set, from the gate.
_scope: ContextVar[Scope | None] = ContextVar("scope", default=None)


def configure(form: Literal["json", "text"], *, secrets: Sequence[str] = ()) -> None:
    """Write all log lines of this process to standard error; `secrets` never appear in one."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(form, secrets))
    logging.getLogger().handlers = [handler]
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)


def log_job(job: Job, *, with_prompt: bool) -> None:
    """Tell that a job was accepted; what is to be drawn only where the operator asked for it."""
    spec = job.spec
    fields: dict[str, Any] = {
        "job": job.id,
        "api": job.api,
        "owner": job.owner,
        "width": spec.width,
        "height": spec.height,
        "steps": spec.num_inference_steps,
        "images": spec.num_images,
        "seed": spec.seed,
    }
    if with_prompt:
        fields |= {"prompt": spec.prompt, "negative_prompt": spec.negative_prompt}
    _log.info("job accepted", extra={"fields": fields})


class AccessLog:
    """Wraps an application; writes a line when a request has ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _scope.set(scope)
        started_s = time.perf_counter()
        status, num_bytes = _CLIENT_LEFT, 0

        async def count(message: Message) -> None:
            nonlocal status, num_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
            num_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, count)
        finally:
            if scope["path"] not in _PROBES or status >= 400:
                _tell(scope, status, num_bytes, time.perf_counter() - started_s)


def _tell(scope: Scope, status: int, num_bytes: int, seconds: float) -> None:
    # Quoted, so that a path with line breaks in it cannot pass for another line.
    path = quote(scope["path"])
    if path.startswith(_LINKS):
        path = f"{_LINKS}{_HIDDEN}"  # the token is all that it takes to see the image
    fields = {
        "method": scope["method"],
        "path": path,
        "status": status,
        "duration_ms": round(1000 * seconds, 1),
        "bytes": num_bytes,
        "client": (scope.get("client") or ("",))[0],
        "owner": scope.get("state", {}).get("owner"),
    }
    level = logging.WARNING if status >= 500 else logging.INFO
    _log.log(level, "%s %s %d", scope["method"], path, status, extra={"fields": fields})


class _Formatter(logging.Formatter):
    """One line for each record; in text, what went wrong below it."""

    def __init__(self, form: Literal["json", "text"], secrets: Sequence[str]) -> None:
        super().__init__()
        self._form = form
        self._secrets = tuple(secrets)

    def format(self, record: logging.LogRecord) -> str:
        scope = _scope.get()
        values = {
            "time": _time(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": None if scope is None else scope.get("state", {}).get("request_id"),
            **getattr(record, "fields", {}),
        }
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self._form == "json":
            values |= {"trace": trace} if trace else {}
            given = {name: value for name, value in values.items() if value is not None}
            text = json.dumps(given, default=str)
        else:
            text = _as_text(values) + (f"\n{trace}" if trace else "")
        for secret in self._secrets:
            text = text.replace(secret, _HIDDEN)
        return text


def _as_text(values: dict[str, Any]) -> str:
    head = f"{values.pop('time')} {values.pop('level'):<7} {values.pop('message')}"
    del values["logger"]
    shown = {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, str) else value
        for name, value in values.items()
        if value is not None and name not in ("method", "path", "status")
    }
    return " ".join([head, *(f"{name}={value}" for name, value in shown.items())])


def _time(created_s: float) -> str:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created_s))
    return f"{stamp}.{int(created_s % 1 * 1000):03}Z"
