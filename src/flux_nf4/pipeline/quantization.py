"""From weights in 16 or 32 bits to NF4 on the disk, tensor by tensor and over several runs.

The result is laid out before any value is read: its header follows from shapes alone, so that each
tensor goes straight to its place. Only doubly quantised weights (v1) need their values first, as
the length of the text beside them depends on their mean absmax: these are quantised twice.

Two tensors are in work at a time, which bounds the memory; the values of each are cut into chunks
for all processors. Neither decides about a bit of the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from flux_nf4 import __version__
from flux_nf4.errors import DiskError, FormatError, InputError
from flux_nf4.formats.component import COMPONENT_KINDS
from flux_nf4.formats.manifest import write_manifest
from flux_nf4.formats.resumable import FileHashes, ResumableFiles
from flux_nf4.formats.verification import file_sha256
from flux_nf4.nf4.codec import NF4Weight
from flux_nf4.pipeline.conversion import Gathered, gather, plan_conversion
from flux_nf4.pipeline.conversion_output import Conversion, check_room
from flux_nf4.pipeline.quantizer import (
    ParallelQuantizer,
    QuantizationSettings,
    one_thread_each,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from flux_nf4.formats.component import ComponentKind
    from flux_nf4.formats.tensorfile import TensorFile, TensorSource
    from flux_nf4.pipeline.quantization_report import ErrorReport

Stage: TypeAlias = Literal["measuring", "quantising", "checking"]

_NUM_BATCHES = 2  # in work at once: one is computed while another is read or written
_MOST_CHECKS = 3


class Watcher(Protocol):
    """Who is told how far it is."""

    def begin(self, stage: Stage, num_bytes: int, num_tensors: int) -> None:
        """A stage begins that has so many bytes, in so many tensors, to do."""

    def advance(self, num_bytes: int, num_tensors: int = 0) -> None:
        """So many more of them are done."""

    def note(self, text: str) -> None:
        """Something worth knowing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What was written; `num_kept` tensors of it by an earlier run."""

    path: Path
    device: str
    num_bytes: int
    num_tensors: int
    num_kept: int
    notes: tuple[str, ...]
    files: Mapping[str, FileHashes]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Batch:
    """Tensors of one file that are made together: a quantised weight, or one tensor alone."""

    file: str
    sources: Mapping[str, TensorSource]

    @property
    def keys(self) -> set[tuple[str, str]]:
        return {(self.file, name) for name in self.sources}

    @property
    def num_bytes(self) -> int:
        return sum(each.num_bytes for each in self.sources.values())

    def make(self) -> Mapping[str, Tensor]:
        name, source = next(iter(self.sources.items()))
        return source.make_all() if source.make_all else {name: source.make()}


def _batches(conversion: Conversion) -> list[_Batch]:
    """In the order of the work: the transformer last, as what fails elsewhere fails early so."""
    grouped: dict[tuple[str, object], dict[str, TensorSource]] = {}
    for file, output in reversed([*conversion.files.items()]):
        for name, source in output.sources.items():
            grouped.setdefault((file, source.make_all or name), {})[name] = source
    batches = [_Batch(file=file, sources=sources) for (file, _), sources in grouped.items()]
    return sorted(batches, key=lambda batch: len(batch.sources) > 1)


def quantize_checkpoint(
    source: str | None,
    parts: Mapping[ComponentKind, str],
    destination: Path,
    settings: QuantizationSettings,
    *,
    watcher: Watcher,
    replace: bool = False,
    report: ErrorReport | None = None,
) -> Quantized:
    """Quantise a checkpoint, or parts of several, into the file or folder `destination`.

    It appears whole or not at all, and its manifest with it. A run that was stopped, or found no
    more room, leaves `<destination>.partial`; called again with the same arguments it goes on
    there, and the result is the same to the byte.

    Raises:
        InputError: there is nothing to quantise, or something that is not to be overwritten.
        ModelNotFoundError, FormatError: as `open_checkpoint`; or a weight holds NaN or infinity.
        DiskError: it could not be written; what is done is kept.
    """
    gathered = gather(source, parts)
    _check_source(gathered, settings, destination)
    about = _about(gathered, settings)
    with one_thread_each() as pool:

        def on_outline(num_bytes: int) -> None:
            watcher.advance(num_bytes, 1)
            _drop_pages(gathered.files)

        quantizer = ParallelQuantizer(settings, pool, report=report, on_outline=on_outline)
        if settings.format == "v1":
            transformer = gathered.components["transformer"]
            watcher.begin("measuring", transformer.num_bytes, len(transformer.entries))
        conversion = plan_conversion(
            gathered, layout=settings.layout, quantizer=quantizer, t5=settings.t5
        )
        notes = (*_notes(gathered), *conversion.notes)
        headers = {name: file.header for name, file in conversion.files.items()}
        output = ResumableFiles(destination, headers, about)
        num_tensors = num_kept = sum(len(header.infos) for header in headers.values())
        files: dict[str, FileHashes] = {}
        if output.is_published():
            output.forget()
        else:
            conversion.check_destination(destination, replace=replace)
            check_room(destination, conversion.num_bytes - output.num_allocated_bytes)
            for note in notes:
                watcher.note(note)
            with output:
                num_kept = len(output.done)
                if report is not None:
                    output.done.clear()  # it needs every weight
                _tell_state(output, num_tensors, watcher)
                files = _write(conversion, output, about, watcher)
    return Quantized(
        path=destination,
        device=str(quantizer.device),
        num_bytes=conversion.num_bytes,
        num_tensors=num_tensors,
        num_kept=num_kept,
        notes=notes,
        files=files,
    )


def _check_source(gathered: Gathered, settings: QuantizationSettings, destination: Path) -> None:
    transformer = gathered.components["transformer"]
    stored = transformer.summary(matrices_only=True)
    if any(
        isinstance(each, NF4Weight)
        for name in transformer.entries
        for each in transformer.parts(name)
    ):
        raise InputError(
            f"`{transformer.source}` is quantised already ({', '.join(stored)})",
            hint="`flux-nf4 convert` writes it in another layout or form, exactly",
        )
    missing = [kind for kind in COMPONENT_KINDS if kind not in gathered.components]
    if missing and settings.layout == "all-in-one":
        options = " ".join(f"--{kind} PATH" for kind in missing)
        raise InputError(
            f"an all-in-one file needs {', '.join(missing)} too, and `{transformer.source}` "
            "has none",
            hint=f"add `{options}`, or quantise the transformer alone by "
            "`--layout transformer-only` and put it together later by `flux-nf4 convert`",
        )
    for file in gathered.files:
        with contextlib.suppress(OSError):  # nothing is there yet, say
            if destination.samefile(file.path):
                raise InputError(
                    f"`{destination}` is the source itself", hint="give the result another name"
                )


def _notes(gathered: Gathered) -> list[str]:
    stored = gathered.components["transformer"].summary(matrices_only=True)
    if not any(each.startswith("fp8") for each in stored):
        return []
    return ["the source is fp8, whose error stays in the result: bf16 is the better source"]


def _about(gathered: Gathered, settings: QuantizationSettings) -> dict[str, Any]:
    """What the result depends on, and what the manifest says of it."""
    options = dataclasses.asdict(settings)
    del options["device"]  # which is nothing that the result depends on
    sources = [file.identity() for file in gathered.files]
    names = ", ".join(dict.fromkeys(str(each["name"]) for each in sources))
    return {
        "made_by": f"flux-nf4 {__version__}",
        "made_from": sources,
        "options": options,
        "licence": gathered.facts.licence,
        "notice": f"Changed from {names}: the transformer is quantised to NF4. The licence of the "
        "source holds for this file too; whoever passes it on passes that licence on.",
    }


def _tell_state(output: ResumableFiles, num_tensors: int, watcher: Watcher) -> None:
    if output.state == "changed":
        watcher.note(
            "what an earlier run left here was made from another source or with other options: "
            "begins anew"
        )
    elif output.state == "resumed":
        watcher.note(
            f"goes on from an earlier run: {len(output.done):,} of {num_tensors:,} tensors"
        )


def _write(
    conversion: Conversion, output: ResumableFiles, about: Mapping[str, Any], watcher: Watcher
) -> dict[str, FileHashes]:
    try:
        files = _fill(conversion, output, watcher)
    except FormatError:
        output.discard()
        raise
    if conversion.is_folder:
        conversion.write_small_files(output.partial)
        for name in (*conversion.texts, *conversion.copies):
            path = output.partial / name
            files[name] = FileHashes(num_bytes=path.stat().st_size, sha256=file_sha256(path))
    # First: killed in between, the next run writes it again, and so both are there or neither.
    write_manifest(output.target, files, about)
    output.publish()
    return files


def _fill(
    conversion: Conversion, output: ResumableFiles, watcher: Watcher
) -> dict[str, FileHashes]:
    batches = _batches(conversion)
    for _ in range(_MOST_CHECKS):
        todo = [batch for batch in batches if not batch.keys <= output.done.keys()]
        _make(todo, conversion, output, watcher)
        watcher.begin("checking", conversion.data_bytes, 0)
        files = output.check(watcher.advance)
        num_bad = sum(not batch.keys <= output.done.keys() for batch in batches)
        if not num_bad:
            return files
        watcher.note(f"{num_bad:,} tensors changed after they were written: made again")
    raise DiskError(
        f"`{output.partial}` does not hold what is written to it", hint="check that disk"
    )


def _make(
    batches: list[_Batch], conversion: Conversion, output: ResumableFiles, watcher: Watcher
) -> None:
    watcher.begin(
        "quantising",
        sum(batch.num_bytes for batch in batches),
        sum(len(batch.sources) for batch in batches),
    )

    def run(batch: _Batch) -> _Batch:
        output.write(batch.file, batch.make())
        _drop_pages(conversion.inputs)  # mapped pages count as memory in use
        return batch

    with ThreadPoolExecutor(_NUM_BATCHES, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for future in as_completed([pool.submit(run, batch) for batch in batches]):
                batch = future.result()
                watcher.advance(batch.num_bytes, len(batch.sources))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _drop_pages(files: Iterable[TensorFile]) -> None:
    for file in files:
        file.drop_pages()
