"""A verb's options as a dataclass: one place from which parser, help and settings are made.

A field made by `option` or `argument` carries how it looks on the command line. Values come as
text from flags and the environment, or typed from a TOML file; `parse_value` checks all of them
the same way, so a number out of range reads the same wherever it was written.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from dataclasses import dataclass
from typing import Any

from flux_nf4.errors import InputError

_KEY = "flag"
_LONGEST_QUOTE = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """How a field is written on the command line; no names: it is the positional argument."""

    names: tuple[str, ...]
    help: str
    metavar: str
    group: str
    minimum: float | None
    maximum: float | None
    setting: bool  # whether the environment and flux-nf4.toml may hold it

    @property
    def label(self) -> str:
        """The long name, as messages quote it."""
        return next((name for name in self.names if name.startswith("--")), self.metavar)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One field of an options class: its name, kind, default, and `Flag`."""

    name: str
    kind: type | tuple[str, ...]  # a tuple: one of these words
    default: Any
    flag: Flag


def option(
    *names: str,
    help: str,
    default: Any = None,
    metavar: str = "",
    group: str = "Options",
    minimum: float | None = None,
    maximum: float | None = None,
    setting: bool = False,
) -> Any:
    """A dataclass field that is an option `names`."""
    flag = Flag(
        names=names,
        help=help,
        metavar=metavar,
        group=group,
        minimum=minimum,
        maximum=maximum,
        setting=setting,
    )
    return dataclasses.field(default=default, metadata={_KEY: flag})


# An option that FLUX_NF4_* variables and `flux-nf4.toml` may hold, too.
setting = functools.partial(option, setting=True)


def argument(metavar: str, *, help: str) -> Any:
    """A dataclass field that is the positional argument."""
    return option(help=help, metavar=metavar, group="Arguments")


def parameters(options_class: type[Any]) -> tuple[Parameter, ...]:
    """Every field of an options class that the command line shows, in order."""
    hints = typing.get_type_hints(options_class)
    return tuple(
        Parameter(
            name=field.name,
            kind=_kind(hints[field.name]),
            default=field.default,
            flag=field.metadata[_KEY],
        )
        for field in dataclasses.fields(options_class)
        if _KEY in field.metadata
    )


def _kind(hint: Any) -> type | tuple[str, ...]:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return tuple(typing.get_args(hint))
    return typing.cast("type", hint)


def parse_value(parameter: Parameter, value: object, label: str) -> Any:
    """The checked value of `parameter`, from text or from TOML; `label` names its source.

    Raises:
        InputError: not of the parameter's kind, not one of its words, or out of its range.
    """
    kind, flag = parameter.kind, parameter.flag
    if isinstance(kind, tuple):
        if value not in kind:
            choices = " or ".join(f"`{word}`" for word in kind)
            raise InputError(f"`{label}` must be {choices}, got `{shortened(value)}`")
        return value
    parsed = _PARSERS[kind](value)
    if parsed is None:
        raise InputError(f"`{label}` must be {_NAMES[kind]}, got `{shortened(value)}`")
    if flag.minimum is not None and parsed < flag.minimum:
        raise InputError(f"`{label}` must be at least {flag.minimum}, got {shortened(value)}")
    if flag.maximum is not None and parsed > flag.maximum:
        raise InputError(f"`{label}` must be at most {flag.maximum}, got {shortened(value)}")
    return parsed


def shortened(value: object) -> str:
    """`value` as text fit for a message: on one line, and never longer than a line."""
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST_QUOTE else f"{text[: _LONGEST_QUOTE - 3]}..."


def _whole(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    try:
        return int(value)
    except ValueError:
        return None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _switch(value: object) -> bool | None:
    words = {"1": True, "true": True, "yes": True, "on": True}
    words |= {"0": False, "false": False, "no": False, "off": False}
    return value if isinstance(value, bool) else words.get(str(value).lower())


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


_PARSERS: dict[type, Any] = {int: _whole, float: _number, bool: _switch, str: _text}
_NAMES = {
    int: "a whole number",
    float: "a finite number",
    bool: "`true` or `false`",
    str: "text",
}
