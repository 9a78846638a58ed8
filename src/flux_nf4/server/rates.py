"""How much each key may ask for in a minute: buckets that fill steadily, a minute's worth deep."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from flux_nf4.server.problems import ApiError, retry_after

if TYPE_CHECKING:
    from flux_nf4.server.settings import ServeSettings


class Rates:
    """What each owner has left, in requests and in megapixel steps.

    A request that needs more than a minute's passes where nothing was used, and the next one waits
    the longer: none is too large for ever.
    """

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, str], tuple[float, float]] = {}  # what was left, and when

    def take(self, settings: ServeSettings, owner: str, megapixel_steps: float) -> None:
        """Let a request of so much work pass.

        Raises:
            ApiError: 429, its owner has nothing left; `Retry-After` says when he has.
        """
        now_s, left = time.monotonic(), {}
        for unit, cost, per_minute in (
            ("requests", 1.0, settings.max_rate),
            ("megapixel steps", megapixel_steps, settings.max_work_rate),
        ):
            if per_minute is None:
                continue
            before, then_s = self._buckets.get((owner, unit), (per_minute, now_s))
            has = min(per_minute, before + (now_s - then_s) * per_minute / 60)
            needs = min(cost, per_minute)
            if has < needs:
                raise ApiError(
                    429,
                    f"this key may ask for {per_minute:g} {unit} a minute, and has done so",
                    code="rate_limit_exceeded",
                    headers=retry_after((needs - has) * 60 / per_minute),
                )
            left[owner, unit] = (has - cost, now_s)
        self._buckets |= left
