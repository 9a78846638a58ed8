"""safetensors files: a reader that trusts nothing, and a writer that leaves no half of a file.

Reading maps the file into memory: opening costs the header alone, and a tensor's pages are read
when its values are. Any bytes at all give a `TensorFile` or a `FormatError`. A file that somebody
truncates while it is mapped is beyond anyone's help: replace files by renaming, as the writer does.
"""

from __future__ import annotations

import mmap
import os
import stat
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from flux_nf4.errors import FormatError, InputError, ModelNotFoundError
from flux_nf4.formats.atomic import atomic_file
from flux_nf4.formats.header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    Header,
    TensorInfo,
    encode_header,
    parse_header,
    plan_header,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["TensorFile", "TensorInfo", "TensorSource", "write_sources", "write_tensor_file"]

_MAP_NORESERVE = 0x4000  # Linux's <asm-generic/mman.h>; Python names it from 3.13 on
_CHUNK_BYTES = 1 << 24  # one write: small enough that Ctrl-C is answered at once

_PICKLE = "a pickle, which can run code when it is opened"
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive, probably PyTorch's own format (a pickle, which can run code)"),
    (b"\x80\x02", _PICKLE),
    (b"\x80\x03", _PICKLE),
    (b"\x80\x04", _PICKLE),
    (b"\x80\x05", _PICKLE),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file that it points to"),
    (b"<!", "a web page, probably an error or log-in page saved instead of the file"),
    (b"<html", "a web page, probably an error or log-in page saved instead of the file"),
)


class TensorFile:
    """A checked, read-only, memory-mapped safetensors file.

    Writing into a tensor changes a private copy of the page, never the file.

    Raises:
        FormatError: the file is not a well-formed safetensors file.
        ModelNotFoundError: there is no such file, or it may not be read.
        InputError: the path is a folder or a device.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            # O_NONBLOCK: opening a named pipe must not wait for a writer.
            descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ModelNotFoundError(f"cannot open `{path}`: {reason}") from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"`{path}` is not a regular file")
            header, self._data_start = self._read_header(descriptor, status.st_size)
            self._mapping = _map_file(descriptor, status.st_size)
        except OSError as error:
            raise FormatError(f"cannot read `{path}`: {error.strerror or error}") from error
        finally:
            os.close(descriptor)
        self.num_bytes: int = status.st_size
        self.metadata: dict[str, str] = header.metadata
        self.infos: Mapping[str, TensorInfo] = MappingProxyType(header.infos)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, in the order of the data."""
        return tuple(self.infos)

    def tensor(self, name: str) -> Tensor:
        """One tensor, backed by the file (copied only where the file does not align it).

        Raises:
            FormatError: there is no tensor of that name.
        """
        info = self.infos.get(name)
        if info is None:
            raise FormatError(f"`{self.path}` holds no tensor `{name}`")
        if info.num_bytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        offset = self._data_start + info.start
        aligned = offset % info.dtype.itemsize == 0
        values = torch.frombuffer(
            self._mapping,
            dtype=info.dtype if aligned else torch.uint8,
            offset=offset,
            count=info.num_bytes // (info.dtype.itemsize if aligned else 1),
        )
        if not aligned:
            values = values.clone().view(info.dtype)
        return values.view(info.shape)

    def _read_header(self, descriptor: int, num_bytes: int) -> tuple[Header, int]:
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            start = file.read(LENGTH_BYTES + 64)
            self._reject_foreign(start)
            if len(start) < LENGTH_BYTES:
                raise FormatError(
                    f"`{self.path}` has {num_bytes} bytes, too few for a safetensors file",
                    hint="was the download cut short? get it again",
                )
            header_bytes = int.from_bytes(start[:LENGTH_BYTES], "little")
            if header_bytes > MAX_HEADER_BYTES:
                raise FormatError(
                    f"`{self.path}` is not a safetensors file: its first bytes, {start[:8]!r}, "
                    f"would mean a header of {header_bytes} bytes"
                )
            data_start = LENGTH_BYTES + header_bytes
            if data_start > num_bytes:
                raise FormatError(
                    f"`{self.path}` ends after {num_bytes} bytes, within its header of "
                    f"{header_bytes} bytes",
                    hint="was the download cut short? get it again",
                )
            file.seek(LENGTH_BYTES)
            data = file.read(header_bytes)
        try:
            header = parse_header(data)
        except FormatError as error:
            raise FormatError(f"`{self.path}`: {error.message}", hint=error.hint) from error
        expected_bytes = data_start + header.data_bytes
        if expected_bytes != num_bytes:
            raise FormatError(
                f"`{self.path}` has {num_bytes} bytes, but its header describes {expected_bytes}",
                hint="was the download cut short? get it again"
                if num_bytes < expected_bytes
                else None,
            )
        return header, data_start

    def _reject_foreign(self, start: bytes) -> None:
        for magic, description in _FOREIGN:
            # A header length that happens to begin so is followed by `{` and decided below.
            if start.startswith(magic) and start[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
                raise FormatError(
                    f"`{self.path}` is {description}, not safetensors",
                    hint="get the safetensors version of this model",
                )


def _map_file(descriptor: int, num_bytes: int) -> mmap.mmap:
    if sys.platform != "linux":
        return mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_COPY)
    # Private and writable, so that torch takes it without a warning; without reserving memory for
    # copies that nobody will make, as Linux else refuses to map a file larger than its memory.
    return mmap.mmap(
        descriptor,
        num_bytes,
        flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
        prot=mmap.PROT_READ | mmap.PROT_WRITE,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSource:
    """A tensor to be written: what the header needs now, and the values when their turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def write_tensor_file(
    path: str | Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, byte for byte as the safetensors library would.

    The file appears whole or not at all.

    Raises:
        DiskError: it could not be written; nothing is left behind.
        FormatError: a name or a dtype that safetensors does not have.
    """
    sources = {
        name: TensorSource(
            dtype=tensor.dtype, shape=tuple(tensor.shape), make=partial(_same, tensor)
        )
        for name, tensor in tensors.items()
    }
    write_sources(path, sources, metadata=metadata)


def write_sources(
    path: str | Path,
    sources: Mapping[str, TensorSource],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors that are made one at a time, so that memory holds one and not all.

    Raises:
        DiskError: the file could not be written; nothing is left behind.
        FormatError: a name or a dtype that safetensors does not have.
    """
    header = plan_header(
        ((name, source.dtype, source.shape) for name, source in sources.items()), metadata
    )
    with atomic_file(path) as file:
        file.write(encode_header(header))
        for name in header.infos:
            _write_values(file, sources[name])


def _write_values(file: BinaryIO, source: TensorSource) -> None:
    # A function of its own, so that one tensor is gone before the next is made.
    tensor = source.make()
    assert (tensor.dtype, tuple(tensor.shape)) == (source.dtype, source.shape)
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    data = values.numpy().data
    for start in range(0, len(data), _CHUNK_BYTES):
        file.write(data[start : start + _CHUNK_BYTES])
