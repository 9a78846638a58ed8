"""The command line `flux-nf4`: the only part that prints, exits, and reads the environment.

`main` parses, runs one verb, and turns what went wrong into a message and an exit code. Typer
parses and does no more: the verb runs outside it, so that every error takes the same way out.
Each verb is a module with a frozen dataclass of its options and a `run` that takes it; torch is
imported only once a verb needs it, so `--help` and bad usage answer at once.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `arguments` as on the command line, without the program's name.

    Returns the exit code: 0 done, 1 our fault, 2 usage, 3 model missing or corrupt, 4 licence or
    login, 5 does not fit, 6 network, 7 disk, 130 and 143 for signals, 141 when the reader of
    stdout went away. An exception that is no `FluxNF4Error` leaves through `sys.excepthook`.
    """
    from flux_nf4.cli.failures import Guard

    given = list(sys.argv[1:] if arguments is None else arguments)
    with Guard(given) as guard:
        from flux_nf4.cli.app import parse

        guard.exit_code = parse(given)()
    return guard.exit_code
