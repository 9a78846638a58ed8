"""Whether a file of the cache is, byte for byte, the one that the Hub holds."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from flux_nf4.errors import DiskError, FormatError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_CHUNK_BYTES = 16 * 2**20


def check_file(
    path: Path,
    name: str,
    num_bytes: int,
    digest: str | None,
    *,
    on_bytes: Callable[[int], None] = lambda _num_bytes: None,
) -> None:
    """Compare a file of the cache with its length and hash; what is wrong is removed.

    `digest` is its SHA-256 (64 hexadecimal digits) or Git's hash of it (40); None: the one that
    the cache keeps it under, if any.

    Raises:
        FormatError: the file is damaged.
        DiskError: it cannot be read.
    """
    try:
        # Where the cache is made of links, it keeps each file under its hash.
        expected = digest or (path.readlink().name if path.is_symlink() else None)
        found_bytes = path.stat().st_size
        problem = f"it has {found_bytes:,} bytes, not {num_bytes:,}"
        if found_bytes == num_bytes:
            if expected is None or not _HASH.fullmatch(expected):
                on_bytes(num_bytes)
                return
            found = _digest(path, num_bytes, is_git=len(expected) == 40, on_bytes=on_bytes)
            if found == expected:
                return
            problem = f"its hash is {found}, not {expected}"
        _remove(path)
    except OSError as error:
        raise DiskError(f"could not read `{path}`: {error.strerror or error}") from error
    raise FormatError(
        f"`{name}` is damaged: {problem}",
        hint="it has been removed from the cache; run the same again",
    )


def _digest(path: Path, num_bytes: int, *, is_git: bool, on_bytes: Callable[[int], None]) -> str:
    # Git hashes a short heading along with the bytes; its SHA-1 is a name here, not a defence.
    hasher = hashlib.sha1(usedforsecurity=False) if is_git else hashlib.sha256()
    if is_git:
        hasher.update(b"blob %d\0" % num_bytes)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            hasher.update(chunk)
            on_bytes(len(chunk))
    return hasher.hexdigest()


def _remove(path: Path) -> None:
    """Remove a file of the cache with every link that leads to it."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink()
        path = target
    path.unlink(missing_ok=True)
