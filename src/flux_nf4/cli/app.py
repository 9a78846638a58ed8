"""From arguments to something to run: the verbs, their parser (Typer), and bad usage.

Typer is given functions made from the options classes. They do nothing but return what is to be
run, so that a verb runs outside Typer and `failures` sees its errors unchanged.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import re
import shlex
from typing import TYPE_CHECKING, Any

from flux_nf4 import __version__
from flux_nf4.cli import (
    bench,
    convert,
    demo,
    doctor,
    generate,
    info,
    plan,
    pull,
    quantize,
    serve,
    verify,
)
from flux_nf4.cli.console import print_data
from flux_nf4.cli.help import top_help, verb_help
from flux_nf4.cli.options import Parameter, parameters
from flux_nf4.cli.settings import read_options
from flux_nf4.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import typer

    from flux_nf4.cli.verb import Verb

_COMPLETION = "_FLUX_NF4_COMPLETE"  # set by the script of `--install-completion`: nothing runs
VERBS: tuple[Verb, ...] = (
    generate.VERB,
    demo.VERB,
    serve.VERB,
    pull.VERB,
    info.VERB,
    verify.VERB,
    quantize.VERB,
    convert.VERB,
    plan.VERB,
    bench.VERB,
    doctor.VERB,
)


def parse(arguments: Sequence[str]) -> Callable[[], int]:
    """What `arguments` ask for, ready to be run.

    Raises:
        InputError: no such command or option, or an option without its value.
    """
    if not arguments and not os.environ.get(_COMPLETION):
        return functools.partial(_print, top_help(VERBS), exit_code=InputError.exit_code)
    if arguments and arguments[0] in {"-V", "--version"}:
        return functools.partial(_print, f"flux-nf4 {__version__}")
    import typer

    # Some versions of Typer carry a Click of their own; the class that its usage errors share is
    # reachable in all of them through the one that it exports.
    usage_error: type[Exception] = typer.BadParameter.__bases__[0]
    # Not `app()`, which would replace `sys.excepthook`.
    group = typer.main.get_command(_app())
    try:
        asked = group.main(list(arguments), prog_name="flux-nf4", standalone_mode=False)
    except usage_error as error:
        raise _as_input_error(error, arguments) from error
    # Typer has already answered where nothing is left to be run: `--help`, say.
    return asked if callable(asked) else functools.partial(int, asked or 0)


def _print(text: str, exit_code: int = 0) -> int:
    print_data(text)
    return exit_code


def _app() -> typer.Typer:
    import typer
    from typer.core import TyperCommand, TyperGroup

    class Group(TyperGroup):
        def get_help(self, _context: Any) -> str:
            return top_help(VERBS)

    app = typer.Typer(
        cls=Group,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for verb in VERBS:

        class Command(TyperCommand):
            shown = verb

            def get_help(self, _context: Any) -> str:
                return verb_help(self.shown)

        app.command(verb.name, cls=Command)(_command(verb))
    return app


def _command(verb: Verb) -> Callable[..., Callable[[], int]]:
    """A function with the signature that Typer reads for `verb`."""

    def command(**flags: Any) -> Callable[[], int]:
        return lambda: verb.run(read_options(verb.options, flags))

    fields = [_for_typer(parameter) for parameter in parameters(verb.options)]
    command.__signature__ = inspect.Signature(fields)  # type: ignore[attr-defined]
    command.__annotations__ = {field.name: field.annotation for field in fields}
    command.__name__ = verb.name
    return command


def _for_typer(parameter: Parameter) -> inspect.Parameter:
    """Text or switch, None where not given: `read_options` does the checking."""
    import typer

    flag, kind = parameter.flag, parameter.kind
    default: Any
    if not flag.names:
        default = typer.Argument(None, metavar=flag.metavar, help=flag.help)
    elif isinstance(kind, tuple):
        default = typer.Option(None, *flag.names, autocompletion=lambda: list(kind))
    else:
        default = typer.Option(None, *flag.names, help=flag.help.splitlines()[0])
    return inspect.Parameter(
        parameter.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=bool | None if kind is bool else str | None,
    )


def _as_input_error(error: Exception, arguments: Sequence[str]) -> InputError:
    """A usage error in our words: lower case, backticks, and what to do next."""
    said = error.format_message() if hasattr(error, "format_message") else str(error)
    message = said.strip().rstrip(".")
    for quote in ("'", '"'):
        parts = message.split(quote)
        if len(parts) % 2:
            message = "`".join(parts)
    message = re.sub(r"(?<![`\w-])--?[a-z][\w-]*", r"`\g<0>`", message)
    message = message[:1].lower() + message[1:]
    first = arguments[0]
    if first == generate.VERB.name and "extra argument" in message:
        return InputError(message, hint='put a prompt of several words in quotes: "a red apple"')
    if any(verb.name == first for verb in VERBS):
        return InputError(message, hint=f"`flux-nf4 {first} --help` shows what there is")
    prompt = " ".join(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    if " " in prompt and "Did you mean" not in message:
        return InputError(
            message, hint=f"to draw it: `{shlex.join(['flux-nf4', 'generate', prompt])}`"
        )
    return InputError(message, hint="`flux-nf4 --help` shows what there is")
