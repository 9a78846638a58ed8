"""safetensors files: a reader that trusts nothing, and a writer that leaves no half of a file.

Reading maps the file into memory: opening costs the header alone, and a tensor's pages are read
when its values are. Any bytes at all give a `TensorFile` or a `FormatError`. A file that somebody
truncates while it is mapped is beyond anyone's help: replace files by renaming, as the writer does.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from flux_nf4.errors import FormatError
from flux_nf4.formats.atomic import atomic_file
from flux_nf4.formats.header import encode_header, plan_header
from flux_nf4.formats.headerfile import open_header

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flux_nf4.formats.header import TensorInfo

_MAP_NORESERVE = 0x4000  # Linux's <asm-generic/mman.h>; Python names it from 3.13 on
_CHUNK_BYTES = 1 << 24  # one write: small enough that Ctrl-C is answered at once


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
        with open_header(path) as opened:
            self._data_start = opened.data_start
            try:
                self._mapping = _map_file(opened.descriptor, opened.num_bytes)
                self._status = os.fstat(opened.descriptor)
            except OSError as error:
                raise FormatError(f"cannot read `{path}`: {error.strerror or error}") from error
        header = opened.header
        self.num_bytes: int = opened.num_bytes
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

    def offset_of(self, tensor: Tensor) -> int | None:
        """Where in the file a tensor's values lie, one after the other; None where they do not."""
        base = torch.frombuffer(self._mapping, dtype=torch.uint8, count=1).data_ptr()
        offset = tensor.data_ptr() - base
        is_here = tensor.is_contiguous() and 0 <= offset <= self.num_bytes - tensor.nbytes
        return offset if is_here and tensor.device.type == "cpu" else None

    def read_into(self, target: memoryview, offset: int) -> None:
        """Read bytes of the file past the mapping: faster, and no page of it stays in the process.

        Raises:
            FormatError: the disk fails, or the file was replaced or has become shorter.
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                if not os.path.samestat(os.fstat(file.fileno()), self._status):
                    raise FormatError(f"`{self.path}` was replaced while it was in use")
                file.seek(offset)
                while target and (num_read := file.readinto(target)):
                    target = target[num_read:]
        except OSError as error:
            raise FormatError(f"cannot read `{self.path}`: {error.strerror}") from error
        if target:
            raise FormatError(f"`{self.path}` has become shorter than {self.num_bytes} bytes")

    def identity(self) -> dict[str, str | int]:
        """What tells this file from another, or from itself after a change, short of its values.

        Raises:
            FormatError: it has gone.
        """
        try:
            with self.path.open("rb") as file:
                header = file.read(self._data_start)
                status = os.fstat(file.fileno())
        except OSError as error:
            raise FormatError(f"cannot read `{self.path}`: {error.strerror or error}") from error
        return {
            "name": self.path.name,
            "bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "header_sha256": hashlib.sha256(header).hexdigest(),
        }

    def drop_pages(self) -> None:
        """Give back the memory of what was read: the file has it still, and is read again.

        What was written into tensors is lost by it.
        """
        if sys.platform == "linux":
            self._mapping.madvise(mmap.MADV_DONTNEED)


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
    """A tensor to be written: what the header needs now, and the values when their turn comes.

    The tensors of one quantised weight share `make_all`, which makes them at once, by name.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    make_all: Callable[[], Mapping[str, Tensor]] | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSource:
        """Values that are there."""
        return cls(dtype=tensor.dtype, shape=tuple(tensor.shape), make=lambda: tensor)

    @property
    def num_bytes(self) -> int:
        """How long the values are."""
        return math.prod(self.shape) * self.dtype.itemsize


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


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values as a file holds them."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _write_values(file: BinaryIO, source: TensorSource) -> None:
    # A function of its own, so that one tensor is gone before the next is made.
    tensor = source.make()
    assert (tensor.dtype, tuple(tensor.shape)) == (source.dtype, source.shape)
    data = tensor_bytes(tensor)
    for start in range(0, len(data), _CHUNK_BYTES):
        file.write(data[start : start + _CHUNK_BYTES])
