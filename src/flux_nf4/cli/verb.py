"""What a verb is: a name, its options, its help, and the function that does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flux_nf4.cli.options import option

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """One command; `run` takes an instance of `options` and returns the exit code."""

    name: str
    summary: str
    options: type
    run: Callable[[Any], int]
    examples: tuple[str, ...]
    note: str = ""  # what the options alone do not say


def json_option() -> Any:
    """`--json`, as every verb has it."""
    return option(
        "--json", default=False, help="JSON on standard output, for programs", group="Output"
    )


def debug_option() -> Any:
    """`--debug`, as every verb has it; `failures` acts on it."""
    return option("--debug", default=False, help="show tracebacks", group="Output")
