"""`/docs`: the API's description as one plain page, which works offline and runs no script."""

from __future__ import annotations

import base64
import hashlib
import re
from html import escape
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse

if TYPE_CHECKING:
    from collections.abc import Iterator

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 46rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8884 }
h3 { margin: 1.5rem 0 .25rem; font-size: 1rem }
p { margin: .25rem 0 }
dl { margin: .5rem 0; display: grid; grid-template-columns: 13rem 1fr; gap: .25rem 1rem }
dd { margin: 0 }
small { opacity: .75 }
@media (max-width: 30rem) { dl { display: block } dd { margin: 0 0 .5rem 1rem } }
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS = {
    "content-security-policy": (
        f"default-src 'self'; style-src 'sha256-{_STYLE_HASH}'; script-src 'none'; "
        "base-uri 'none'; frame-ancestors 'none'"
    )
}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{style}</style></head>
<body><h1>{title}</h1>
<p>For programs: <a href="openapi.json">openapi.json</a>. With a key:
<code>Authorization: Bearer KEY</code>.</p>
{body}
</body></html>
"""
# How a description's words are told.
_BOUNDS = {
    "minimum": "from {}",
    "exclusiveMinimum": "above {}",
    "maximum": "up to {}",
    "multipleOf": "a multiple of {}",
    "maxLength": "at most {} characters",
}


def router(app: FastAPI) -> APIRouter:
    """The page about the routes that `app` has when it is asked for."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/docs")
    async def docs() -> HTMLResponse:
        """Every route, its parameters and its body."""
        schema = app.openapi()
        title = escape(f"{schema['info']['title']} {schema['info']['version']}")
        page = _PAGE.format(title=title, style=_STYLE, body="\n".join(_sections(schema)))
        return HTMLResponse(page, headers=_HEADERS)

    return routes


def _sections(schema: dict[str, Any]) -> Iterator[str]:
    by_tag: dict[str, list[str]] = {}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            lines = by_tag.setdefault(operation.get("tags", ["Other"])[0], [])
            lines.append(_operation(f"{method.upper()} {path}", operation))
    for tag, lines in by_tag.items():
        yield f"<h2>{escape(tag)}</h2>"
        yield from lines
    yield "<h2>Bodies</h2>"
    for name, body in schema["components"]["schemas"].items():
        yield f'<h3 id="{escape(name)}">{escape(name)}</h3><p>{_text(body)}</p>{_fields(body)}'


def _operation(name: str, operation: dict[str, Any]) -> str:
    parts = [f"<h3><code>{escape(name)}</code></h3><p>{_text(operation)}</p>"]
    given = operation.get("parameters", ())
    if given:
        fields = {each["name"]: {"description": each["in"], **each["schema"]} for each in given}
        parts.append(_fields({"properties": fields}))
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        shown = content["schema"]
        if "$ref" in shown:
            target = escape(shown["$ref"].rpartition("/")[2])
            parts.append(f'<p>{escape(kind)}: <a href="#{target}">{target}</a></p>')
        else:
            parts.append(f"<p>{escape(kind)}</p>{_fields(shown)}")
    return "".join(parts)


def _fields(schema: dict[str, Any]) -> str:
    rows = []
    for name, field in schema.get("properties", {}).items():
        needed = "needed; " if name in schema.get("required", ()) else ""
        kind = escape(f"{needed}{_kind(field)}")
        rows.append(f"<dt><code>{escape(name)}</code></dt>")
        rows.append(f"<dd>{_text(field)} <small>{kind}</small></dd>")
    return f"<dl>{''.join(rows)}</dl>" if rows else ""


def _kind(field: dict[str, Any]) -> str:
    """A field's type and bounds in words; that it may be null goes without saying."""
    given = [each for each in field.get("anyOf", (field,)) if each.get("type") != "null"]
    words = []
    for each in given:
        values = each.get("enum") or ([each["const"]] if "const" in each else [])
        words.append(", ".join(map(str, values)) or str(each.get("type", "anything")))
    stated = field | (given[0] if given else {})
    bounds = [
        text.format(_number(stated[name])) for name, text in _BOUNDS.items() if name in stated
    ]
    return ", ".join([" or ".join(words) or "null", *bounds])


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


def _text(described: dict[str, Any]) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(described.get("description", "")))
