"""Folders that appear whole or not at all, as `atomic` has it for files.

Everything goes into a temporary folder beside the target, which is renamed at the end. A folder
that was there before is moved aside first and removed last: killed in between, its files are all
still there under a temporary name.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from flux_nf4.errors import DiskError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill; it takes `path`'s place when the block ends without an error.

    Raises:
        DiskError: it could not be written; nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    token = secrets.token_hex(8)
    temporary = target.parent / f".flux-nf4-{token}.tmp"
    previous = target.parent / f".flux-nf4-{token}.old"
    try:
        temporary.mkdir()
        yield temporary
        for folder in (temporary, *(each for each in temporary.rglob("*") if each.is_dir())):
            _flush(folder)
        _replace(temporary, target, previous)
        _flush(target.parent)
    except OSError as error:
        raise DiskError(
            f"could not write `{path}`: {error.strerror or error}",
            hint="check that folder, and how much is free on its disk",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)


def _replace(temporary: Path, target: Path, previous: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    target.rename(previous)
    try:
        temporary.rename(target)
    except BaseException:
        previous.rename(target)
        raise


def _flush(folder: Path) -> None:
    if os.name != "posix":  # pragma: no cover  Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems cannot flush a folder; its files are complete by then.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
