"""Help that fits a screen: made from the options, the same under every version of Typer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flux_nf4.cli.console import styled
from flux_nf4.cli.options import Parameter, parameters

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flux_nf4.cli.verb import Verb

_INDENT = 2
_WIDEST_NAME = 23
_HELP = ("-h, --help", "show this")
_TOP_OPTIONS = (
    ("-V, --version", "print the version"),
    ("--install-completion", "completion with Tab, for the shell that runs this"),
    _HELP,
)
_TOP_NOTE = (
    "A setting is looked for in the options, in FLUX_NF4_* variables, in flux-nf4.toml",
    "in this folder, and in flux-nf4.toml in your configuration folder.",
    "",
    "Exit codes: 0 done, 1 our fault, 2 usage, 3 model missing or corrupt, 4 licence",
    "or login, 5 does not fit, 6 network, 7 disk, 130 and 143 stopped by a signal.",
)
_GROUPS = (
    "Arguments",
    "Options",
    "Parts",
    "What to draw",
    "How to draw it",
    "Model",
    "Quantisation",
    "Address",
    "Limits",
    "Cluster",
    "Output",
)


def top_help(verbs: Sequence[Verb]) -> str:
    """What `flux-nf4 --help` prints."""
    lines = [f"{_heading('Usage:')} flux-nf4 VERB [OPTIONS]", "", "FLUX.1 images from NF4 weights."]
    lines += _section("Verbs", [(verb.name, verb.summary) for verb in verbs])
    lines += _section("Options", _TOP_OPTIONS)
    lines += _examples(verbs[0].name, verbs[0].examples[:1])
    lines += ["", *_TOP_NOTE]
    return "\n".join(lines)


def verb_help(verb: Verb) -> str:
    """What `flux-nf4 VERB --help` prints."""
    shown = parameters(verb.options)
    places = "".join(f" [{each.flag.metavar}]" for each in shown if not each.flag.names)
    lines = [f"{_heading('Usage:')} flux-nf4 {verb.name}{places} [OPTIONS]", "", verb.summary]
    for group in sorted({each.flag.group for each in shown}, key=_GROUPS.index):
        rows = [(_names(each), each.flag.help) for each in shown if each.flag.group == group]
        lines += _section(group, rows)
    lines.append(_row(*_HELP))
    lines += _examples(verb.name, verb.examples)
    if verb.note:
        lines += ["", verb.note]
    return "\n".join(lines)


def _examples(name: str, examples: Sequence[str]) -> list[str]:
    commands = [f"flux-nf4 {name} {example}".rstrip() for example in examples]
    if len(commands) == 1:
        return ["", f"{_heading('Example:')} {commands[0]}"]
    return [*_section("Examples", []), *(f"  {command}" for command in commands)]


def _names(parameter: Parameter) -> str:
    flag = parameter.flag
    return f"{', '.join(flag.names)} {flag.metavar}".strip()


def _section(title: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    return ["", _heading(f"{title}:"), *(_row(name, text) for name, text in rows)]


def _row(name: str, text: str) -> str:
    first, *rest = text.splitlines()
    below = (f"{'':{_INDENT + _WIDEST_NAME + 1}}{line}" for line in rest)
    return "\n".join((f"{'':{_INDENT}}{name:<{_WIDEST_NAME}} {first}", *below))


def _heading(text: str) -> str:
    return styled(text, "bold")
