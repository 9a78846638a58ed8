"""Ctrl-C and SIGTERM as exceptions, and noted, for where the exception is turned into another.

An exception lets every file in the making be removed on its way out. But a C extension that is
being imported may make an error of its own of it; with the note, that is not taken for a fault.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from types import FrameType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + the number, as shells have it
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StoppedBySignal(KeyboardInterrupt):
    """A signal asked the run to stop; nothing on the way takes it for an error."""


class SignalWatch:
    """While it is open, SIGINT and SIGTERM raise `StoppedBySignal` and are noted."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> SignalWatch:
        for number in EXIT_CODES:
            try:
                self._previous[number] = signal.signal(number, self._raise)
            except ValueError:  # not the main thread: whoever called us there owns the signals
                break
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _raise(self, number: int, _frame: FrameType | None) -> NoReturn:
        self.received = signal.Signals(number)
        raise StoppedBySignal
