"""Paths as people write them, and small files of text read whole."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flux_nf4.errors import DiskError, InputError

_MOST_BYTES = 16 * 2**20


def path_of(text: str) -> Path:
    """`text` as a path; `~` and `~name` are the home folders they name.

    Raises:
        InputError: it is empty, no path at all, or names the home folder of nobody.
    """
    if not text.strip() or "\0" in text:
        raise InputError(
            "a path is empty, or no path at all", hint="name a file or a folder, or leave it out"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"`{text}` begins with no home folder that is known here",
            hint="write it out, or put `./` before a name that begins with `~`",
        ) from error


def model_path(text: str | None) -> Path | None:
    """The checkpoint that `--model` names; None: the built-in demo model, which is the default.

    Raises:
        InputError: as `path_of`.
    """
    return None if text in (None, "demo") else path_of(str(text))


def check_permission(path: Path, *, hint: str) -> None:
    """Make sure that a file, or into a folder, may be written.

    Raises:
        DiskError: this user may not.
    """
    if not os.access(path, os.W_OK | os.X_OK if path.is_dir() else os.W_OK):
        raise DiskError(f"no permission to write to `{path}`", hint=hint)


def read_text(file_name: str) -> str:
    """The text of a file; `-`: of standard input.

    Raises:
        InputError: it cannot be read, is larger than 16 MiB, or is not UTF-8.
    """
    name = "standard input" if file_name == "-" else f"`{file_name}`"
    path = path_of(file_name)
    try:
        if file_name == "-":
            data = sys.stdin.buffer.read(_MOST_BYTES + 1)
        else:
            with path.open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    if len(data) > _MOST_BYTES:
        raise InputError(f"{name} is larger than {_MOST_BYTES // 2**20} MiB; is it the right file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}"
        ) from error
