"""What is printed, and where: results on standard output, everything else on standard error.

Rich draws where a person looks on, and knows of `NO_COLOR` and of terminals that cannot. Text is
never wrapped: lines are meant to be copied.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from flux_nf4.errors import DiskError

if TYPE_CHECKING:
    from rich.console import Console


def print_data(text: str) -> None:
    """One result, as it stands.

    Raises:
        BrokenPipeError: the reader went away.
        DiskError: standard output is a file that cannot be written.
    """
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_stdout()
        raise DiskError(f"could not write to standard output: {error.strerror}") from error


def print_json(value: Any, *, indent: int | None = None) -> None:
    """One JSON value; ASCII, so that no encoding can spoil it."""
    print_data(json.dumps(value, indent=indent, default=str))


def print_note(text: str) -> None:
    """Something worth knowing, in one line."""
    _print_to_stderr(("note: ", "bold cyan"), (text, ""))


def print_plain(text: str) -> None:
    """A line on standard error without a label."""
    _print_to_stderr((text, ""))


def print_error(message: str, hint: str | None = None) -> None:
    """What went wrong, and what to do next on a line of its own."""
    _print_to_stderr(("error: ", "bold red"), (message, ""))
    if hint:
        _print_to_stderr(("hint: ", "bold cyan"), (hint, ""))


def discard_stdout() -> None:
    """Forget what standard output still holds: Python would try, and complain, again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def styled(text: str, style: str) -> str:
    """`text` for standard output, in `style` where that is a terminal with colours."""
    if not sys.stdout.isatty():
        return text
    console = _console_for(sys.stdout)
    with console.capture() as capture:
        console.print(text, style=style, end="", soft_wrap=True, markup=False, highlight=False)
    return capture.get()


def stderr_console() -> Console:
    """Rich's console on standard error, one for all, so that bars and notes do not collide."""
    return _console_for(sys.stderr)


@functools.lru_cache(maxsize=2)
def _console_for(stream: Any) -> Console:
    from rich.console import Console

    return Console(file=stream, highlight=False, markup=False, emoji=False)


def printable(text: str) -> str:
    """`text` with control characters spelt out: names from files must not steer the terminal."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text
    )


def _print_to_stderr(*parts: tuple[str, str]) -> None:
    from rich.text import Text

    # Nobody is left to complain to where standard error is gone.
    with contextlib.suppress(BrokenPipeError):
        text = Text.assemble(*((printable(part), style) for part, style in parts))
        stderr_console().print(text, soft_wrap=True)
