"""Files that appear whole or not at all, whatever happens while they are written.

The bytes go to a temporary file beside the target; it is flushed to the disk, renamed over the
target, and the folder is flushed too. On any failure, Ctrl-C included, the temporary file is
removed and a file that was there before stays as it was. The mode comes from the umask
(safetensors' own writer leaves 0600 and does not flush).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from flux_nf4.errors import DiskError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

_HINTS = {
    errno.ENOSPC: "free some space on that disk, or write elsewhere",
    errno.EDQUOT: "the disk quota is used up: free some space, or write elsewhere",
    errno.EFBIG: "that disk cannot hold a file of this size; write elsewhere",
    errno.EACCES: "check who may write to that folder, or write elsewhere",
    errno.EPERM: "check who may write to that folder, or write elsewhere",
    errno.EROFS: "that disk is read-only; write elsewhere",
    errno.ENOENT: "make the folder first, or check its name",
    errno.ENOTDIR: "a part of that path is a file; check its name",
    errno.ENAMETOOLONG: "choose a shorter name",
}
# Some network file systems cannot flush a folder; the file itself is complete by then.
_FOLDER_CANNOT_BE_FLUSHED = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF}
TEMPORARY_FILES = ".flux-nf4-*.tmp"


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write; it takes `path`'s place when the block ends without an error.

    Raises:
        InputError: `path` is a folder, a device, or no path at all.
        DiskError: it could not be written; nothing is left behind.
    """
    if "\0" in str(path):
        raise InputError(f"the path {str(path)!r} holds a NUL character")
    # A link stays a link: what it points to is replaced.
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".flux-nf4-{secrets.token_hex(8)}.tmp"
    try:
        if target.exists() and not target.is_file():
            kind = "a folder" if target.is_dir() else "not a regular file"
            raise InputError(f"`{path}` is {kind}", hint="give the name of a file to write")
        with _create(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        flush_folder(target.parent)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def disk_error(path: str | Path, error: OSError) -> DiskError:
    """What to raise where `path` could not be written: it says why, and what to do."""
    return DiskError(
        f"could not write `{path}`: {error.strerror or error}",
        hint=_HINTS.get(error.errno or 0, "write elsewhere"),
    )


def _create(path: Path) -> BinaryIO:
    # O_EXCL: never follow or overwrite what somebody else put there; 0666 is cut by the umask.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def flush_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the file system can."""
    if os.name != "posix":  # pragma: no cover  Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _FOLDER_CANNOT_BE_FLUSHED:
            raise
    finally:
        os.close(descriptor)
