"""Who may ask, and from where: keys, host names, origins, and the headers of every answer.

Plain functions of a request's headers; `gate` applies them, and sends what they raise.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import re
from typing import TYPE_CHECKING

from flux_nf4.server.problems import ApiError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flux_nf4.server.settings import ServeSettings

LOCAL_OWNER = "local"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

# Probes carry no key, and the page must load before it can ask for one; it holds no data.
_OPEN_PATHS = frozenset({"/", "/favicon.ico", "/livez", "/readyz", "/health", "/startupz"})
# A link is signed and ends: it is its own key.
_OPEN_FOLDERS = ("/static/", "/v1/files/")
# Where a browser or a client of A1111 can send nothing but a name and a password.
_BASIC_PATHS = ("/sdapi/", "/docs", "/openapi.json", "/metrics")
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]/@\s]+)(?::\d{1,5})?")

SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
        "form-action 'self'; frame-ancestors 'none'"
    ),
    "cache-control": "no-store",
}


class KeyRing:
    """The keys that open the server; only their SHA-256 is kept."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def owner(self, path: str, headers: Mapping[str, str]) -> str:
        """Whose request it is.

        Raises:
            ApiError: 401, the path needs a key and the request has none, or a wrong one.
        """
        if not self._digests:
            return LOCAL_OWNER
        key = _given_key(path, headers.get("authorization", ""))
        if key is not None:
            digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
            if any(hmac.compare_digest(digest, known) for known in self._digests):
                return digest.hex()[:16]
        if is_open(path):
            return LOCAL_OWNER
        challenge = "Basic" if path.startswith(_BASIC_PATHS) else "Bearer"
        raise ApiError(
            401,
            "the API key is missing" if key is None else "the API key is wrong",
            code="invalid_api_key",
            hint="send `Authorization: Bearer KEY`",
            headers={"WWW-Authenticate": f'{challenge} realm="flux-nf4"'},
        )


def is_open(path: str) -> bool:
    """Whether a path is served without a key."""
    return path in _OPEN_PATHS or path.startswith(_OPEN_FOLDERS)


def _given_key(path: str, authorization: str) -> str | None:
    scheme, _, value = authorization.strip().partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic" and path.startswith(_BASIC_PATHS):
        try:
            name_and_key = base64.b64decode(value, validate=True).decode()
        except ValueError:
            return ""
        return name_and_key.partition(":")[2]
    return None


def check_host(settings: ServeSettings, host: str) -> None:
    """Refuse a name that an attacker may have pointed at this address (DNS rebinding).

    An address typed as numbers is what it says. With a key a stranger's page can do nothing, so
    all names are served then, unless `allowed_hosts` says which.

    Raises:
        ApiError: 400, no host; 403, one that is not served.
    """
    match = _HOST.fullmatch(host)
    if match is None:
        raise ApiError(400, "the request names no valid host", code="invalid_host")
    name = match.group(1).lower().rstrip(".")
    if name in {"localhost", settings.host.lower(), *map(str.lower, settings.allowed_hosts)}:
        return
    if settings.api_keys and not settings.allowed_hosts:
        return
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError as error:
        raise ApiError(
            403,
            f"this server is not known as `{name[:60]}`",
            code="host_not_allowed",
            hint=f"start it with `--allowed-host {name[:60]}` if it is",
        ) from error


def check_origin(settings: ServeSettings, method: str, headers: Mapping[str, str]) -> None:
    """Refuse to change anything for a page from elsewhere.

    Programs send no `Origin`; browsers do, with everything but plain reading.

    Raises:
        ApiError: 403, the page is from another origin, or from none (`null`).
    """
    if method in SAFE_METHODS:
        return
    origin = headers.get("origin")
    if origin is None:
        is_elsewhere = headers.get("sec-fetch-site") in {"cross-site", "same-site"}
    else:
        is_own = origin.partition("://")[2].lower() == headers.get("host", "").lower()
        is_elsewhere = not is_own and origin not in settings.cors_origins
    if is_elsewhere:
        raise ApiError(
            403,
            f"a page of `{(origin or 'another site')[:80]}` may not use this server",
            code="origin_not_allowed",
            hint="start it with `--cors-origin` and that origin if it may",
        )


def cors_headers(settings: ServeSettings, headers: Mapping[str, str]) -> dict[str, str]:
    """What lets a page of an origin on the list read the answer; empty for all others."""
    origin = headers.get("origin")
    if origin is None or origin not in settings.cors_origins:
        return {}
    return {
        "access-control-allow-origin": origin,
        "access-control-expose-headers": "x-request-id, retry-after, x-should-retry",
        "cross-origin-resource-policy": "cross-origin",
        "vary": "Origin",
    }


def preflight_headers(settings: ServeSettings, headers: Mapping[str, str]) -> dict[str, str]:
    """What lets a page of an origin on the list ask at all; empty for all others.

    Every header that it asks for: OpenAI's client has a dozen of its own.
    """
    if not cors_headers(settings, headers):
        return {}
    return {
        "access-control-allow-methods": "GET, POST, PUT, DELETE",
        "access-control-allow-headers": headers.get("access-control-request-headers", ""),
        "access-control-max-age": "600",
    }
