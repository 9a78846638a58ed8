"""Where an image goes: `-o` as a file, a folder or a template, and names that are safe.

A prompt becomes part of a name only as letters, digits and hyphens, so it can never lead to
another folder. A file that is there already is kept, and the new one gets `-2`, `-3` and so on;
only a file named exactly (`-o cat.png`) is replaced, as that is what the name says.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
import secrets
import string
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flux_nf4.cli.paths import check_permission, path_of
from flux_nf4.errors import DiskError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

FIELDS = ("prompt", "seed", "index", "date", "model")
DEFAULT_NAME = "{prompt}-{seed}.png"
DEFAULT_OUTPUT = f"outputs/{DEFAULT_NAME}"
_OTHER_FORMATS = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".jxl", ".tif", ".tiff", ".webp"}
# File systems take names of 255 bytes; this leaves room for seed, index and date.
_SLUG_CHARACTERS, _SLUG_BYTES = 60, 150
_NUMBER_FORMAT = re.compile(r"0?\d?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where images go: a template, or one file that may be replaced."""

    template: str
    replaces: bool = False

    def path(self, values: Mapping[str, str | int]) -> Path:
        """The file for one image; `values` has all of `FIELDS`, texts made safe by `slug`."""
        return Path(self.template if self.replaces else self.template.format_map(values))


def plan_destination(output: str | None, num_images: int) -> Destination:
    """What `-o` means, checked before any work is done.

    Raises:
        InputError: an unknown field, a format other than PNG, one file for several images, or a
            device in a file's place.
        DiskError: the folder cannot be written to.
    """
    destination = _read_output(DEFAULT_OUTPUT if output is None else output)
    if destination.replaces and num_images > 1:
        stem = destination.template[: -len(".png")]
        raise InputError(
            f"`{destination.template}` is one file, but {num_images} images are asked for",
            hint=f"name a folder, or number them: `-o '{stem}-{{index}}.png'`",
        )
    # With every field as a slug, so that the folder is a likely one.
    example = destination.path({"prompt": "a", "seed": 0, "index": 1, "date": "a", "model": "a"})
    _check_writable(example.parent)
    if destination.replaces and example.exists() and not example.is_file():
        raise InputError(
            f"`{example}` is not a regular file", hint="give the name of a file to write"
        )
    return destination


def slug(text: str) -> str:
    """`text` as part of a file name: letters, digits and hyphens of any script, lower case."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    joined = "-".join(re.findall(r"[^\W_]+", folded))[:_SLUG_CHARACTERS]
    short = joined.encode()[:_SLUG_BYTES].decode(errors="ignore")
    return short.strip("-") or "image"


def store(save: Callable[[Path], None], path: Path, *, replaces: bool) -> Path:
    """Let `save` write `path`, or the next free name unless it `replaces`; returns the name.

    Raises:
        DiskError: it could not be written; nothing is left behind.
    """
    make_folder(path.parent)
    if replaces:
        save(path)
        return path
    temporary = path.with_name(f".flux-nf4-{secrets.token_hex(8)}.tmp.png")
    try:
        save(temporary)
        return _claim(temporary, path)
    except OSError as error:
        raise DiskError(f"could not write `{path}`: {error.strerror}") from error
    except DiskError as error:
        message = error.message.replace(str(temporary), str(path))
        raise DiskError(message, hint=error.hint) from error
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it, where they are not there.

    Raises:
        DiskError: it could not be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(
            f"could not make the folder `{folder}`: {error.strerror}",
            hint="choose another place with `-o`",
        ) from error


def _claim(temporary: Path, path: Path) -> Path:
    for number in itertools.count(1):
        name = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        if os.path.lexists(name):
            continue
        try:
            # A link, unlike a renaming, fails where another process was faster.
            os.link(temporary, name)
        except FileExistsError:
            continue
        except OSError:  # a file system without links
            temporary.replace(name)
        return name
    raise AssertionError("unreachable: the numbers do not end")


def _read_output(output: str) -> Destination:
    if not output.strip() or "\0" in output:
        raise InputError("`--output` is empty, or no path at all", hint="name a file or a folder")
    if output == "-":
        raise InputError(
            "an image is not written to standard output", hint="name a file: `-o image.png`"
        )
    path = path_of(output)
    is_folder = output.endswith(("/", os.sep)) or path.is_dir()
    has_fields = "{" in output or "}" in output
    suffix = path.suffix.lower()
    if not is_folder and suffix in _OTHER_FORMATS:
        raise InputError(
            f"images are written as PNG, not as `{suffix}`", hint=f"`{path.with_suffix('.png')}`"
        )
    if not is_folder and not has_fields and suffix == ".png":
        return Destination(template=str(path), replaces=True)
    if not has_fields:
        escaped = str(path).replace("{", "{{").replace("}", "}}")
        return Destination(template=str(Path(escaped) / DEFAULT_NAME))
    _check_fields(output)
    if is_folder:
        return Destination(template=str(path / DEFAULT_NAME))
    return Destination(template=str(path) if suffix == ".png" else f"{path}.png")


def _check_fields(template: str) -> None:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"`{template}` is not a template: {error}", hint="write `{{` for a brace as such"
        ) from error
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if name not in FIELDS:
            nearest = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.0)[0]
            raise InputError(
                f"`{template}` has an unknown field `{{{name}}}`",
                hint=f"the nearest is `{{{nearest}}}`; all of them: {', '.join(FIELDS)}",
            )
        is_number = name in {"seed", "index"}
        if conversion or (form and not (is_number and _NUMBER_FORMAT.fullmatch(form))):
            raise InputError(
                f"`{template}` has a format that does not suit `{{{name}}}`",
                hint="only numbers take one: `{index:04}`",
            )


def _check_writable(folder: Path) -> None:
    nearest = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    hint = "choose another place with `-o`"
    if not nearest.is_dir():
        raise DiskError(f"`{nearest}` is not a folder", hint=hint)
    check_permission(nearest, hint=hint)
