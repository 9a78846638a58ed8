"""The warm-up of a worker before its first job, which tells why where it fails, and no more."""

from __future__ import annotations

import sys
import traceback
from typing import TYPE_CHECKING

from flux_nf4.server.failures import FAULTS, describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from flux_nf4.pipeline.load import Model


def warm_up(model: Model, on_event: Callable[[], None]) -> bool:
    """`flux_nf4.pipeline.warm_up.warm_up`, and whether it went well.

    Else standard error says why: a smaller image may be drawn all the same. `on_event` is called
    while it goes on.
    """
    from flux_nf4.pipeline import warm_up
    from flux_nf4.pipeline.events import Event, Notice

    def follow(event: Event) -> None:
        on_event()
        if isinstance(event, Notice):
            sys.stderr.write(f"warm-up: {event.message}\n")

    try:
        warm_up.warm_up(model, on_event=follow)
    except FAULTS as error:
        failure = describe(error)
        if failure["code"] != "out_of_memory":
            traceback.print_exc()
        sys.stderr.write(f"no warm-up: {failure['message']}\n")
        return False
    return True
