"""Files of tensors to be written, and the folder or the single file that they make.

Everything is known before any value is made: names, sizes, and what must not be overwritten.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flux_nf4.errors import DiskError, InputError
from flux_nf4.formats.atomic import atomic_file
from flux_nf4.formats.atomicfolder import atomic_folder
from flux_nf4.formats.component import COMPONENT_KINDS
from flux_nf4.formats.folder import MODEL_INDEX, PART_FOLDERS, TOKENIZER_FOLDERS
from flux_nf4.formats.header import encode_header, plan_header
from flux_nf4.formats.tensorfile import TensorFile, TensorSource, write_sources

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from flux_nf4.formats.header import Header


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """One file of tensors to be written."""

    sources: Mapping[str, TensorSource]
    metadata: Mapping[str, str]

    @property
    def data_bytes(self) -> int:
        """How many bytes its tensors have."""
        return sum(each.num_bytes for each in self.sources.values())

    @property
    def header(self) -> Header:
        """What it will begin with."""
        specs = ((name, source.dtype, source.shape) for name, source in self.sources.items())
        return plan_header(specs, self.metadata)

    @property
    def num_bytes(self) -> int:
        """How long the file will be."""
        return len(encode_header(self.header)) + self.data_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """Which files a conversion makes; a single one has the path ''. `notes` are for the user."""

    files: Mapping[str, OutputFile]
    texts: Mapping[str, bytes] = field(default_factory=dict)
    copies: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sources: tuple[Path, ...] = ()
    inputs: tuple[TensorFile, ...] = ()

    @property
    def is_folder(self) -> bool:
        """Whether it makes a folder."""
        return "" not in self.files

    @property
    def num_bytes(self) -> int:
        """How many bytes of tensors will be written, headers included."""
        return sum(file.num_bytes for file in self.files.values())

    @property
    def data_bytes(self) -> int:
        """How many bytes `on_bytes` will hear of."""
        return sum(file.data_bytes for file in self.files.values())

    def write(
        self,
        path: str | Path,
        *,
        replace: bool = False,
        on_bytes: Callable[[int], None] = lambda _num_bytes: None,
    ) -> None:
        """Write it to `path`, whole or not at all; `on_bytes` hears of every tensor's bytes.

        Raises:
            InputError: something is there already and is not to be, or must not be, replaced.
            DiskError: it could not be written; nothing is left behind.
            FormatError: a source file is damaged.
        """
        path = Path(path)
        self.check_destination(path, replace=replace)
        check_room(path, self.num_bytes)
        if not self.is_folder:
            self._write_file(path, self.files[""], on_bytes)
            return
        with atomic_folder(path) as folder:
            self.write_small_files(folder)  # what fails there fails early so
            for name, file in self.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                self._write_file(folder / name, file, on_bytes)

    def write_small_files(self, folder: Path) -> None:
        """Write what a folder holds beside tensors.

        Raises:
            DiskError: a file could not be written, or one that is copied not be read.
        """
        copied = {name: _read(source) for name, source in self.copies.items()}
        for name, text in {**self.texts, **copied}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(folder / name) as written:
                written.write(text)

    def _write_file(self, path: Path, file: OutputFile, on_bytes: Callable[[int], None]) -> None:
        sources = {
            name: dataclasses.replace(source, make=partial(self._made, source, on_bytes))
            for name, source in file.sources.items()
        }
        write_sources(path, sources, metadata=file.metadata)

    def _made(self, source: TensorSource, on_bytes: Callable[[int], None]) -> Tensor:
        for read in self.inputs:
            read.drop_pages()  # of the tensor before: mapped pages count as memory in use
        tensor = source.make()
        on_bytes(tensor.nbytes)
        return tensor

    def check_destination(self, path: Path, *, replace: bool) -> None:
        """See that `path` may be written.

        Raises:
            InputError: something is there already and is not to be, or must not be, replaced.
            DiskError: the folder around it cannot be looked into.
        """
        if "\0" in str(path):
            raise InputError(f"the path {str(path)!r} holds a NUL character")
        try:
            self._check_destination(path, replace=replace)
        except OSError as error:
            raise DiskError(
                f"could not write `{path}`: {error.strerror or error}", hint="choose another name"
            ) from error

    def _check_destination(self, path: Path, *, replace: bool) -> None:
        if self.is_folder and path.suffix == ".safetensors":
            raise InputError(f"`{path}` is to be a folder", hint="give it a name without a suffix")
        if not path.exists():
            return
        if path.is_dir() != self.is_folder:
            raise InputError(
                f"`{path}` is a {'folder' if path.is_dir() else 'file'}, and a "
                f"{'folder' if self.is_folder else 'file'} is to be written",
                hint="give another name, or choose another `--layout`",
            )
        if self.is_folder and not any(path.iterdir()):
            return
        if not replace:
            raise InputError(f"`{path}` exists already", hint="replace it by `--force`")
        here = path.resolve()
        if any(here in (each.resolve(), *each.resolve().parents) for each in self.sources):
            raise InputError(
                f"`{path}` holds what is being converted", hint="give the result another name"
            )
        if self.is_folder:
            self._check_replaceable(path)

    def _check_replaceable(self, path: Path) -> None:
        known = {MODEL_INDEX, "scheduler", *PART_FOLDERS.values(), *TOKENIZER_FOLDERS.values()}
        known |= {f"{kind}.safetensors" for kind in COMPONENT_KINDS}
        others = sorted(each.name for each in path.iterdir() if each.name not in known)
        if others:
            raise InputError(
                f"`{path}` holds more than a model (`{others[0]}`), and is not replaced",
                hint="give another name, or remove it yourself",
            )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DiskError(f"could not read `{path}`: {error.strerror or error}") from error


def check_room(path: Path, num_bytes: int) -> None:
    """Raises DiskError where the disk of `path` has less than `num_bytes` free."""
    try:
        free = shutil.disk_usage(path.absolute().parent).free
    except OSError:  # no such folder, say: writing will tell
        return
    if free < num_bytes:
        raise DiskError(
            f"`{path}` needs {num_bytes:,} bytes, and its disk has {free:,} free",
            hint="free some space on that disk, or write elsewhere",
        )
