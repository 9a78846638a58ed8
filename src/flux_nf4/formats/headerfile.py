"""The header of a safetensors file on the disk: opened, checked against the file's length.

Without torch, so that telling what a file holds costs no more than reading its header.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flux_nf4.errors import FormatError, InputError, ModelNotFoundError
from flux_nf4.formats.header import LENGTH_BYTES, MAX_HEADER_BYTES, Header, parse_header

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PICKLE = "a pickle, which can run code when it is opened"
_WEB_PAGE = "a web page, probably an error or log-in page in place of the file"
_OTHER_VERSION = "get the safetensors version of this model"
_AGAIN = "download it again; `flux-nf4 pull` fetches models"
_FOREIGN = (
    (
        b"PK\x03\x04",
        "a zip archive, probably PyTorch's own format (a pickle, which can run code)",
        _OTHER_VERSION,
    ),
    (b"\x80\x02", _PICKLE, _OTHER_VERSION),
    (b"\x80\x03", _PICKLE, _OTHER_VERSION),
    (b"\x80\x04", _PICKLE, _OTHER_VERSION),
    (b"\x80\x05", _PICKLE, _OTHER_VERSION),
    (b"GGUF", "a GGUF file", _OTHER_VERSION),
    (b"\x89HDF", "an HDF5 file", _OTHER_VERSION),
    (b"\x1f\x8b", "a gzip archive", _OTHER_VERSION),
    (b"version https://git-lfs", "a Git LFS pointer in place of the file", _AGAIN),
    (b"<!", _WEB_PAGE, _AGAIN),
    (b"<html", _WEB_PAGE, _AGAIN),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedHeader:
    """A header that fits its file; `descriptor` is open while `open_header` is."""

    header: Header
    data_start: int
    num_bytes: int
    descriptor: int


@contextlib.contextmanager
def open_header(path: str | Path) -> Iterator[OpenedHeader]:
    """Open a file, and check all that can be checked without its data.

    Raises:
        FormatError: the file is not a well-formed safetensors file.
        ModelNotFoundError: there is no such file, or it may not be read.
        InputError: the path is a folder or a device.
    """
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelNotFoundError(f"cannot open `{path}`: {reason}") from error
    try:
        yield _opened(path, descriptor)
    finally:
        os.close(descriptor)


def _opened(path: str | Path, descriptor: int) -> OpenedHeader:
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"`{path}` is not a regular file")
        header, data_start = _read_header(path, descriptor, status.st_size)
    except OSError as error:
        raise FormatError(f"cannot read `{path}`: {error.strerror or error}") from error
    return OpenedHeader(
        header=header, data_start=data_start, num_bytes=status.st_size, descriptor=descriptor
    )


def _read_header(path: str | Path, descriptor: int, num_bytes: int) -> tuple[Header, int]:
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        start = file.read(LENGTH_BYTES + 64)
        _reject_foreign(path, start)
        if len(start) < LENGTH_BYTES:
            raise FormatError(
                f"`{path}` has {num_bytes} bytes, too few for a safetensors file",
                hint="was the download cut short? get it again",
            )
        header_bytes = int.from_bytes(start[:LENGTH_BYTES], "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise FormatError(
                f"`{path}` is not a safetensors file: its first bytes, {start[:8]!r}, "
                f"would mean a header of {header_bytes} bytes"
            )
        data_start = LENGTH_BYTES + header_bytes
        if data_start > num_bytes:
            raise FormatError(
                f"`{path}` ends after {num_bytes} bytes, within its header of {header_bytes} bytes",
                hint="was the download cut short? get it again",
            )
        file.seek(LENGTH_BYTES)
        data = file.read(header_bytes)
    try:
        header = parse_header(data)
    except FormatError as error:
        raise FormatError(f"`{path}`: {error.message}", hint=error.hint) from error
    expected_bytes = data_start + header.data_bytes
    if expected_bytes != num_bytes:
        raise FormatError(
            f"`{path}` has {num_bytes} bytes, but its header describes {expected_bytes}",
            hint="was the download cut short? get it again" if num_bytes < expected_bytes else None,
        )
    return header, data_start


def _reject_foreign(path: str | Path, start: bytes) -> None:
    for magic, description, hint in _FOREIGN:
        # A header length that happens to begin so is followed by `{` and decided below.
        if start.startswith(magic) and start[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
            raise FormatError(f"`{path}` is {description}, not safetensors", hint=hint)
