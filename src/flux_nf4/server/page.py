"""The web page: the files of `ui/`, read once, served from memory under their own names.

The list of names and types is fixed at the start and a request only looks names up in it, so no
path of a request ever reaches the file system. Everything the page does goes through the API.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from flux_nf4.server.problems import ApiError

if TYPE_CHECKING:
    from flux_nf4.server.context import Context

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}
# Scripts, styles and connections from here alone, none inline. Trusted types forbid the ways in
# which a text could become markup, so that a prompt can never run.
_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)
_HEADERS = {
    # Asked for again each time and mostly answered with 304, so that an update shows at once.
    "cache-control": "no-cache",
    "content-security-policy": _POLICY,
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    content: bytes
    media_type: str
    etag: str


def _read_files() -> dict[str, _File]:
    files = {}
    for entry in resources.files("flux_nf4.server").joinpath("ui").iterdir():
        media_type = _TYPES.get(f".{entry.name.rpartition('.')[2]}")
        if media_type is None:
            continue
        content = entry.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        files[entry.name] = _File(content=content, media_type=media_type, etag=etag)
    return files


def router(_context: Context) -> APIRouter:
    """`/`, its icon, and the files that it loads from `/static/`."""
    files = _read_files()
    routes = APIRouter(include_in_schema=False)

    def answer(name: str, request: Request) -> Response:
        file = files.get(name)
        if file is None:
            raise ApiError(404, "there is no such file", code="not_found")
        headers = _HEADERS | {"etag": file.etag}
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)

    @routes.get("/")
    async def page(request: Request) -> Response:
        return answer("index.html", request)

    @routes.get("/favicon.ico")
    async def icon(request: Request) -> Response:
        return answer("logo.svg", request)

    @routes.get("/static/{name}")
    async def static(name: str, request: Request) -> Response:
        return answer(name, request)

    return routes
