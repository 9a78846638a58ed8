"""Ctrl-C and SIGTERM as exceptions, and noted, for where the exception is turned into another.

An exception lets every file in the making be removed on its way out. But a C extension that is
being imported may make an error of its own of it; with the note, that is not taken for a fault.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + the number, as shells have it
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_SECONDS_TO_LEAVE = 0.02  # the finaliser that dropped the exception


class StoppedBySignal(KeyboardInterrupt):
    """A signal asked the run to stop; nothing on the way takes it for an error."""


class SignalWatch:
    """While it is open, SIGINT and SIGTERM raise `StoppedBySignal` and are noted."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}
        self._previous_hook: Callable[[sys.UnraisableHookArgs], object] = sys.unraisablehook
        self._again: threading.Timer | None = None

    def __enter__(self) -> SignalWatch:
        for number in EXIT_CODES:
            try:
                self._previous[number] = signal.signal(number, self._raise)
            except ValueError:  # not the main thread: whoever called us there owns the signals
                return self
        self._previous_hook, sys.unraisablehook = sys.unraisablehook, self._send_again
        return self

    def __exit__(self, *_error: object) -> None:
        if not self._previous:
            return
        if self._again is not None:
            self._again.cancel()
        sys.unraisablehook = self._previous_hook
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _raise(self, number: int, _frame: FrameType | None) -> NoReturn:
        self.received = signal.Signals(number)
        raise StoppedBySignal

    def _send_again(self, dropped: sys.UnraisableHookArgs) -> None:
        if self.received is None or not isinstance(dropped.exc_value, StoppedBySignal):
            self._previous_hook(dropped)
            return
        # To the process, and not raised in that thread: the main one may be waiting in the system.
        again = threading.Timer(_SECONDS_TO_LEAVE, os.kill, (os.getpid(), self.received))
        self._again, again.daemon = again, True
        again.start()
