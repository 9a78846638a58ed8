"""From what went wrong to a message and an exit code: the one place where a run ends badly.

Errors made on purpose carry their own code and hint. What nobody foresaw goes on to
`sys.excepthook`, which says that it is our fault and how to see more; only there is a traceback
kept back.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from flux_nf4.cli.console import discard_stdout, print_error, print_plain
from flux_nf4.cli.options import shortened
from flux_nf4.cli.signals import EXIT_CODES, NAMES, SignalWatch
from flux_nf4.errors import DiskError, DoesNotFitError, FluxNF4Error

if TYPE_CHECKING:
    import signal
    from collections.abc import Sequence
    from types import TracebackType

BROKEN_PIPE = 141  # 128 + SIGPIPE's number, as shells have it


class Guard:
    """A context for a whole run: afterwards `exit_code` is right, whatever happened in it."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.exit_code = 0
        self.debug = wants_debug(arguments)
        self._signals = SignalWatch()

    def __enter__(self) -> Guard:
        self._signals.__enter__()
        _prepare_streams()
        if not self.debug:
            _silence_libraries()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self._signals.__exit__(kind, error, trace)
        if self._signals.received is not None:  # perhaps without an error: Typer swallows it
            self.exit_code = self._stopped(error, self._signals.received)
            return True
        if error is None:
            return True
        exit_code = self._exit_code_of(error)
        if exit_code is None:
            if not self.debug:
                sys.excepthook = _say_that_it_is_our_fault
            return False
        self.exit_code = exit_code
        return True

    def _exit_code_of(self, error: BaseException) -> int | None:
        """Say what happened; None where it is nothing that a run should end with."""
        if isinstance(error, BrokenPipeError):
            discard_stdout()
            return BROKEN_PIPE
        if _is_out_of_memory(error):
            return self._report(_as_does_not_fit(error))
        if isinstance(error, OSError) and error.strerror:
            return self._report(_as_disk_error(error))
        return self._report(error) if isinstance(error, FluxNF4Error) else None

    def _report(self, error: FluxNF4Error) -> int:
        if self.debug:
            traceback.print_exception(error)
        print_error(error.message, error.hint)
        return error.exit_code

    def _stopped(self, error: BaseException | None, number: signal.Signals) -> int:
        if self.debug and error is not None:
            traceback.print_exception(error)
        print_plain(f"stopped by {NAMES[number]}")
        return EXIT_CODES[number]


def wants_debug(arguments: Sequence[str]) -> bool:
    """Whether tracebacks are to be shown: before parsing, as parsing may be what fails."""
    in_environment = os.environ.get("FLUX_NF4_DEBUG", "").lower()
    return "--debug" in arguments or in_environment not in {"", "0", "false", "no", "off"}


def _say_that_it_is_our_fault(
    kind: type[BaseException], error: BaseException, _trace: TracebackType | None
) -> None:
    print_error(
        f"this is a bug in flux-nf4: {kind.__name__}: {shortened(error)}",
        "run it again with `--debug` and report what that prints",
    )


def _is_out_of_memory(error: BaseException) -> bool:
    # By name: torch's class exists only where torch was imported, and its CPU allocator has none.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = str(error).lower()
    signs = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(sign in said for sign in signs)


def _as_does_not_fit(error: BaseException) -> FluxNF4Error:
    said = str(error).strip().splitlines()
    detail = f": {said[0][:160]}" if said else ""
    return DoesNotFitError(
        f"out of memory{detail}",
        hint="`flux-nf4 doctor` shows what is free; try a smaller `--size`, or `--device cpu`",
    )


def _as_disk_error(error: OSError) -> FluxNF4Error:
    # What the system says of a path that nobody looked at before: too long, in a locked folder ...
    if error.filename is not None:
        return DiskError(f"cannot use `{shortened(error.filename)}`: {error.strerror}")
    discard_stdout()  # which may be what cannot be written
    return DiskError(f"the system says: {error.strerror}")


def _silence_libraries() -> None:
    """Keep what libraries log and warn of to `--debug`: nobody here can act on it."""
    # A handler on the root takes the place of Python's last resort, which prints to stderr.
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(logging.NullHandler())
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _prepare_streams() -> None:
    # Closed ones are None, and the next file that is opened would take their place.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115
    # A terminal that cannot show a prompt's characters must not end the run.
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
