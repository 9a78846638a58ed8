"""Files of tensors written in any order and over several runs: what one finished, the next keeps.

Beside the target stand `<target>.partial`, the files at their full length with what is done in its
place, and `<target>.partial.journal`. The journal's first line says what is made, from what and
how; where any of that has changed, the work begins anew. Each other line is a checksum and the
sha256 of tensors that were written. A line that is torn or damaged does not count, nor do those
after it. In the end nothing is believed: every file is read back and compared before it takes the
target's place, whatever happened to the partial file between two runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import sys
import threading
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from flux_nf4.errors import DiskError, InputError
from flux_nf4.formats.atomic import TEMPORARY_FILES, disk_error, flush_folder
from flux_nf4.formats.atomicfolder import replace_folder
from flux_nf4.formats.header import Header, encode_header
from flux_nf4.formats.tensorfile import tensor_bytes

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class FileHashes:
    """A file's length and sha256, and the sha256 of every tensor in it."""

    num_bytes: int
    sha256: str
    tensors: dict[str, str] = field(default_factory=dict)


class ResumableFiles:
    """The files of one result in the making; a context, as only one process may write them.

    `headers` has the header of every file by its path within the target; a target that is a
    single file has the path ''. `identity` is what the bytes depend on beside the headers: plain
    JSON. `state` says what was found beside the target: nothing, a start to go on from, or one
    that was made from something else and is no more.

    Raises:
        InputError: another process is at it, or what stands in the way is not ours.
        DiskError: something could not be written; what is done stays for the next run.
    """

    state: Literal["new", "resumed", "changed"]

    def __init__(
        self, target: str | Path, headers: Mapping[str, Header], identity: Mapping[str, Any]
    ) -> None:
        self.target = Path(os.path.realpath(target))
        self.partial = self.target.with_name(f"{self.target.name}.partial")
        self.journal_path = self.target.with_name(f"{self.target.name}.partial.journal")
        self.done: dict[tuple[str, str], str] = {}
        self._headers = {name: (header, encode_header(header)) for name, header in headers.items()}
        encoded = b"".join(each for _, each in self._headers.values())
        plan = {**identity, "headers": hashlib.sha256(encoded).hexdigest(), "files": [*headers]}
        self._first_line = _encode_line(plan)
        self._lock = threading.Lock()
        self._journal: BinaryIO

    def __enter__(self) -> ResumableFiles:
        with self._disk_errors():
            self._journal = self.journal_path.open("a+b", buffering=0)
            try:
                self._open()
            except BaseException:
                self._journal.close()
                raise
        return self

    def __exit__(self, *_error: object) -> None:
        self._journal.close()

    def _open(self) -> None:
        self._take_lock()
        self._journal.seek(0)
        data = self._journal.read()
        num_good_bytes, done = self._parse_journal(data)
        if num_good_bytes and self._has_partial():
            self.state, self.done = "resumed", done
            self._journal.truncate(num_good_bytes)
            for stray in self.partial.rglob(TEMPORARY_FILES):
                stray.unlink()  # of a run that was killed: it would be published
            return
        if not data and os.path.lexists(self.partial):
            self.journal_path.unlink()
            raise InputError(
                f"`{self.partial}` is in the way, and was not made here",
                hint="remove it, or give the result another name",
            )
        self.state = "changed" if data else "new"
        self._remove_partial()
        self._journal.truncate(0)
        self._journal.write(self._first_line)
        for name in self._headers:
            self._create(name)

    def _take_lock(self) -> None:
        if sys.platform == "win32":  # pragma: no cover
            return
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is writing `{self.target}`",
                hint="wait for it, or give the result another name",
            ) from error
        except OSError:  # some network file systems have no locks
            return

    def _parse_journal(self, data: bytes) -> tuple[int, dict[tuple[str, str], str]]:
        """How many bytes of the journal are good, 0 if it is not ours; and what they say."""
        done: dict[tuple[str, str], str] = {}
        if not data.startswith(self._first_line):
            return 0, done
        num_good_bytes = len(self._first_line)
        for line in data[num_good_bytes:].splitlines(keepends=True):
            record = _decode_line(line)
            if record is None:
                break
            num_good_bytes += len(line)
            done.update({(record["file"], name): each for name, each in record["sha256"].items()})
        return num_good_bytes, done

    def _path(self, name: str) -> Path:
        return self.partial / name if name else self.partial

    def _num_bytes(self, name: str) -> int:
        header, encoded = self._headers[name]
        return len(encoded) + header.data_bytes

    def _has_partial(self) -> bool:
        try:
            found = [self._path(name).lstat() for name in self._headers]
        except OSError:
            return False
        return all(
            stat.S_ISREG(status.st_mode) and status.st_size == self._num_bytes(name)
            for status, name in zip(found, self._headers, strict=True)
        )

    def _remove_partial(self) -> None:
        if self.partial.is_dir() and not self.partial.is_symlink():
            shutil.rmtree(self.partial)
        else:
            self.partial.unlink(missing_ok=True)

    def _create(self, name: str) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.truncate(self._num_bytes(name))

    @property
    def num_allocated_bytes(self) -> int:
        """How much of the disk a start beside the target takes already."""
        found = 0
        for name in self._headers:
            with contextlib.suppress(OSError, AttributeError):  # Windows does not tell
                found += self._path(name).stat().st_blocks * 512
        return found

    def is_published(self) -> bool:
        """Whether an earlier run got as far as giving the result its name, and no further."""
        try:
            _, done = self._parse_journal(self.journal_path.read_bytes())
        except OSError:
            return False
        every = {
            (name, each) for name, (header, _) in self._headers.items() for each in header.infos
        }
        is_moved = self.target.exists() and not os.path.lexists(self.partial)
        return bool(every) and done.keys() == every and is_moved

    def write(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors that were made together; may be called from several threads.

        Raises:
            DiskError: no room, say; what was done before stays for the next run.
        """
        header, encoded = self._headers[file]
        hashes = {}
        with self._disk_errors(), self._path(file).open("r+b", buffering=0) as out:
            for name, tensor in tensors.items():
                info, data = header.infos[name], tensor_bytes(tensor)
                assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape)), name
                out.seek(len(encoded) + info.start)
                _write_all(out, data)
                hashes[name] = hashlib.sha256(data).hexdigest()
            with self._lock:
                _write_all(self._journal, _encode_line({"file": file, "sha256": hashes}))
                self.done.update({(file, name): each for name, each in hashes.items()})

    def check(self, on_bytes: Callable[[int], None]) -> dict[str, FileHashes]:
        """Read back what was written; tensors that are not as they were are struck from `done`."""
        with self._disk_errors():
            return {name: self._check(name, on_bytes) for name in self._headers}

    def _check(self, name: str, on_bytes: Callable[[int], None]) -> FileHashes:
        header, encoded = self._headers[name]
        whole = hashlib.sha256(encoded)
        tensors = {}
        with self._path(name).open("r+b", buffering=0) as file:
            _write_all(file, encoded)  # always: it is known, and so need not be in the journal
            for info in header.infos.values():
                own = hashlib.sha256()
                for chunk in _chunks(file, info.num_bytes):
                    whole.update(chunk)
                    own.update(chunk)
                    on_bytes(len(chunk))
                tensors[info.name] = own.hexdigest()
                if self.done.get((name, info.name)) != own.hexdigest():
                    self.done.pop((name, info.name), None)
        num_bytes = self._num_bytes(name)
        return FileHashes(num_bytes=num_bytes, sha256=whole.hexdigest(), tensors=tensors)

    def publish(self) -> None:
        """Give the result its name, and forget how it came about.

        Raises:
            DiskError: it could not be; what is done stays for the next run.
        """
        with self._disk_errors():
            for name in self._headers:
                with self._path(name).open("rb") as file:
                    os.fsync(file.fileno())
            if self.partial.is_dir():
                replace_folder(self.partial, self.target)
            else:
                self.partial.replace(self.target)
                flush_folder(self.target.parent)
            self.forget()

    def forget(self) -> None:
        """Remove the journal, and with it the claim to go on."""
        self.journal_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove everything, as it can come to no good end."""
        with self._disk_errors():
            self._remove_partial()
            self.forget()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            wrapped = disk_error(self.target, error)
            if self.partial.exists():
                wrapped.hint = f"{wrapped.hint}; what is done is kept, and the same command goes on"
            raise wrapped from error


def _encode_line(values: Mapping[str, Any]) -> bytes:
    text = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _decode_line(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    values = json.loads(text)
    return values if isinstance(values, dict) else None


def _write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    for start in range(0, len(data), _CHUNK_BYTES):
        chunk = data[start : start + _CHUNK_BYTES]
        while chunk:
            chunk = chunk[file.write(chunk) :]


def _chunks(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    while num_bytes:
        chunk = file.read(min(num_bytes, _CHUNK_BYTES))
        if not chunk:
            raise DiskError(f"`{file.name}` was cut short while it was written")
        num_bytes -= len(chunk)
        yield chunk
