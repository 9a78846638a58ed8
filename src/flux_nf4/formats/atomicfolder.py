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

from flux_nf4.formats.atomic import disk_error, flush_folder

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill; it takes `path`'s place when the block ends without an error.

    Raises:
        DiskError: it could not be written; nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".flux-nf4-{secrets.token_hex(8)}.tmp"
    try:
        temporary.mkdir()
        yield temporary
        replace_folder(temporary, target)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(temporary: Path, target: Path) -> None:
    """Give a folder, whose files are flushed, the name of another, which is removed.

    Raises:
        OSError: it could not be; both are where they were.
    """
    previous = target.parent / f".flux-nf4-{secrets.token_hex(8)}.old"
    for folder in (temporary, *(each for each in temporary.rglob("*") if each.is_dir())):
        flush_folder(folder)
    _replace(temporary, target, previous)
    flush_folder(target.parent)
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
