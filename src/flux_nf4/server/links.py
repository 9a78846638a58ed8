"""Links to images that work without a key for a while: what one may show it says itself, signed.

Nothing is stored for a link: it names a job's image, and the jobs that are kept are bounded.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flux_nf4.server.problems import ApiError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Links:
    """Signs and reads tokens; the secret lives as long as the process."""

    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def sign(self, values: Sequence[Any], *, lifetime_s: float) -> str:
        """A token that holds `values` (plain JSON) and ends after `lifetime_s`."""
        text = json.dumps([int(time.time() + lifetime_s), *values], separators=(",", ":"))
        return _text(self._signature(text.encode()) + text.encode())

    def read(self, token: str) -> list[Any]:
        """What `sign` was given.

        Raises:
            ApiError: 404, it is not ours, was changed, or has ended.
        """
        gone = ApiError(404, "this link has ended, or never was one", code="link_not_found")
        try:
            raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
        except ValueError as error:
            raise gone from error
        signature, text = raw[:32], raw[32:]
        if not hmac.compare_digest(signature, self._signature(text)):
            raise gone
        ends_at, *values = json.loads(text)
        if time.time() > ends_at:
            raise gone
        return values

    def _signature(self, text: bytes) -> bytes:
        return hmac.digest(self.secret, text, hashlib.sha256)


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")
