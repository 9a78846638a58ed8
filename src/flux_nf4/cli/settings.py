"""Settings: flags over `FLUX_NF4_*` over `flux-nf4.toml`, read once into a frozen dataclass.

With `--from IMAGE`, what made that image comes between the flags and all others.

Of the files, the one in the current folder counts before the one in the user's configuration
folder, key by key. A key that no one knows is an error naming the nearest: a setting that is
silently skipped costs more than one that stops the run.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from flux_nf4.cli.options import Parameter, parameters, parse_value, setting
from flux_nf4.cli.paths import path_of
from flux_nf4.cli.server_settings import ModelSettings, ServerSettings
from flux_nf4.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FILE_NAME = "flux-nf4.toml"
PREFIX = "FLUX_NF4_"
# A layer that gives one of a pair hides the other in the layers below it.
_RIVALS = {
    "size": ("width", "height"),
    "width": ("size",),
    "height": ("size",),
    "prompt_file": ("prompt",),
}

Options = TypeVar("Options")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(ModelSettings):
    """What stays the same from one run to the next: each field is a flag, a variable and a key."""

    count: int = setting(
        "-n",
        "--count",
        metavar="N",
        default=1,
        minimum=1,
        maximum=10_000,
        help="images of each prompt, with seeds counting up [1]",
        group="What to draw",
    )
    seed: int | None = setting(
        "--seed",
        metavar="N",
        minimum=0,
        maximum=2**64 - 1,
        help="first seed [random; always reported]",
        group="What to draw",
    )
    negative: str = setting(
        "--negative",
        metavar="TEXT",
        default="",
        help="what to keep out; needs --true-cfg above 1",
        group="What to draw",
    )
    size: str | None = setting(
        "-s",
        "--size",
        metavar="WxH",
        help="in pixels, multiples of 16 [the model's own]",
        group="How to draw it",
    )
    width: int | None = setting(
        "--width",
        metavar="N",
        minimum=16,
        help="in place of --size",
        group="How to draw it",
    )
    height: int | None = setting(
        "--height",
        metavar="N",
        minimum=16,
        help="in place of --size",
        group="How to draw it",
    )
    steps: int | None = setting(
        "--steps",
        metavar="N",
        minimum=1,
        maximum=1000,
        help="denoising steps [20; FLUX.1-schnell: 4]",
        group="How to draw it",
    )
    guidance: float = setting(
        "--guidance",
        metavar="X",
        default=3.5,
        minimum=0,
        maximum=100,
        help="how closely to follow the prompt, at no cost [3.5]",
        group="How to draw it",
    )
    true_cfg: float = setting(
        "--true-cfg",
        metavar="X",
        default=1.0,
        minimum=1,
        maximum=100,
        help="true guidance; above 1 takes twice the time [1]",
        group="How to draw it",
    )
    schedule: Literal["flux", "forge"] = setting(
        "--schedule",
        metavar="flux|forge",
        default="flux",
        help="steps spaced by image size, or as Forge does [flux]",
        group="How to draw it",
    )
    output: str | None = setting(
        "-o",
        "--output",
        metavar="PATH",
        help="file.png, folder, or template with {prompt} {seed}\n"
        "{index} {date} {model} [outputs/{prompt}-{seed}.png]",
        group="Output",
    )
    preview: bool = setting(
        "--preview/--no-preview",
        default=False,
        help="keep a preview beside the output while it is drawn",
        group="Output",
    )
    quiet: bool = setting(
        "-q",
        "--quiet",
        default=False,
        help="print nothing but results and errors",
        group="Output",
    )


def setting_files(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Where `flux-nf4.toml` is looked for, the first counting most."""
    if sys.platform == "win32":
        folder = environment.get("APPDATA", "")
    else:
        folder = environment.get("XDG_CONFIG_HOME", "")
        if not folder and environment.get("HOME"):
            folder = str(Path(environment["HOME"]) / ".config")
    here = Path(FILE_NAME)
    return (here, Path(folder) / "flux-nf4" / FILE_NAME) if folder else (here,)


def read_options(
    options_class: type[Options],
    flags: Mapping[str, object],
    *,
    environment: Mapping[str, str] | None = None,
) -> Options:
    """The options of one run; `flags` are those given (None: not given).

    Raises:
        InputError: a value cannot be what it says, the environment or a settings file holds a
            key that no setting has, or the image of `--from` holds no settings.
        DiskError, FormatError: that image cannot be read.
    """
    known = {parameter.name: parameter for parameter in parameters(options_class)}
    given = {name: value for name, value in flags.items() if value is not None}
    values = {
        name: parse_value(known[name], value, known[name].flag.label)
        for name, value in given.items()
    }
    _check_rivals(values, "the command line")
    if not any(parameter.flag.setting for parameter in known.values()):
        return options_class(**values)
    layers = _layers(os.environ if environment is None else environment)
    if values.get("from_image"):
        layers = itertools.chain([_from_image(values, known)], layers)
    for layer in layers:
        hidden = {rival for name in values for rival in _RIVALS.get(name, ())}
        for name, value in layer.items():
            if name in known and name not in hidden:
                values.setdefault(name, value)
    return options_class(**values)


def _from_image(given: Mapping[str, Any], known: Mapping[str, Parameter]) -> dict[str, Any]:
    from flux_nf4.cli.repeat import option_values, read_record

    image = given["from_image"]
    found = option_values(read_record(image))
    if "strength" in found and "image" not in given:
        raise InputError(
            f"`{image}` was drawn from another image, which is not in it",
            hint="give that one with `--image`",
        )
    return {
        name: parse_value(known[name], value, f"{name}` of `{image}")
        for name, value in found.items()
        if name in known
    }


def _layers(environment: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    yield _from_environment(environment)
    for path in setting_files(environment):
        yield _from_file(path)


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for variable, text in sorted(environment.items()):
        name = variable.removeprefix(PREFIX).lower()
        # No settings: `failures` reads the first, `serve` the second.
        if variable.startswith(PREFIX) and name not in ("debug", "api_key"):
            values[name] = _parsed(name, text, variable)
    _check_rivals(values, "the environment")
    return values


def _from_file(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise InputError(f"cannot read the settings file `{path}`: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"the settings file `{path}` is not TOML: {error}") from error
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        values[name] = _parsed(name, value, f"{key}` in `{path}")
        if name == "model" and values[name] != "demo":
            values[name] = str(path.parent / path_of(values[name]))
    _check_rivals(values, f"`{path}`")
    return values


def _parsed(name: str, value: object, label: str) -> Any:
    known = setting_parameters()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        written = f"{PREFIX}{nearest.upper()}" if label.startswith(PREFIX) else nearest
        raise InputError(
            f"unknown setting `{label}`",
            hint=f"the nearest is `{written}`; all of them: {', '.join(sorted(known))}",
        )
    return parse_value(known[name], value, label)


@functools.cache
def setting_parameters() -> dict[str, Parameter]:
    """Every setting by name: what the environment and the files may hold."""
    classes = (Settings, ServerSettings)
    return {each.name: each for one in classes for each in parameters(one) if each.flag.setting}


def _check_rivals(values: Mapping[str, object], source: str) -> None:
    rivals = [name for name in ("width", "height") if name in values]
    if "size" in values and rivals:
        raise InputError(
            f"{source} gives both `size` and `{rivals[0]}`",
            hint="use `--size WxH`, or `--width` and `--height`",
        )
