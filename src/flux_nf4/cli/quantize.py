"""`flux-nf4 quantize`: weights in 16 or 32 bits to NF4."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flux_nf4.cli.byte_progress import ByteProgress
from flux_nf4.cli.console import print_data, print_json, print_note
from flux_nf4.cli.convert import SourceOptions
from flux_nf4.cli.findings import num_bytes_text
from flux_nf4.cli.options import option
from flux_nf4.cli.paths import check_permission, path_of
from flux_nf4.cli.progress import duration
from flux_nf4.cli.verb import Verb, debug_option, json_option
from flux_nf4.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flux_nf4.pipeline.quantization import Quantized, Stage
    from flux_nf4.pipeline.quantization_report import ErrorReport


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions(SourceOptions):
    """The options of `quantize`."""

    scale: Literal["absmax", "search"] = option(
        "--scale",
        metavar="NAME",
        default="absmax",
        help="the scale of a block: its largest value (`absmax`), or\n"
        "what gives the least squared error (`search`) [absmax]",
        group="Quantisation",
    )
    format: Literal["v2", "v1"] = option(
        "--format",
        metavar="NAME",
        default="v2",
        help="scales in float32 (`v2`), or in 8 bits (`v1`) [v2]",
        group="Quantisation",
    )
    block_size: Literal["64", "128"] = option(
        "--block-size",
        metavar="N",
        default="64",
        help="weights that share a scale: 64 or 128 [64]",
        group="Quantisation",
    )
    t5_dtype: Literal["fp8", "keep"] = option(
        "--t5-dtype",
        metavar="NAME",
        default="fp8",
        help="T5 in a file: `fp8`, or as it is (`keep`) [fp8]",
        group="Quantisation",
    )
    device: str = option(
        "--device",
        metavar="NAME",
        default="auto",
        help="`auto`, `cpu`, `cuda`, `cuda:1` [auto]",
        group="Quantisation",
    )
    layout: Literal["all-in-one", "transformer-only", "diffusers"] = option(
        "--layout",
        metavar="NAME",
        default="all-in-one",
        help="`all-in-one`, `transformer-only` or `diffusers`\n[all-in-one]",
        group="Output",
    )
    report: str | None = option(
        "--report", metavar="FILE", help="the error of every layer, as JSON", group="Output"
    )
    plot: str | None = option(
        "--plot", metavar="FILE", help="the error as a picture (.svg)", group="Output"
    )
    force: bool = option(
        "--force", default=False, help="replace what is there already", group="Output"
    )
    quiet: bool = option(
        "-q", "--quiet", default=False, help="print nothing but errors", group="Output"
    )
    json: bool = json_option()
    debug: bool = debug_option()


class _ConsoleWatcher:
    """A bar for each stage, and notes."""

    def __init__(self, *, quiet: bool, with_notes: bool) -> None:
        self.quiet = quiet
        self.with_notes = with_notes
        self._progress = ByteProgress("", 0, quiet=True)

    def __enter__(self) -> _ConsoleWatcher:
        return self

    def __exit__(self, *_error: object) -> None:
        self._progress.close()

    def begin(self, stage: Stage, num_bytes: int, num_tensors: int) -> None:
        self._progress.close()
        self._progress = ByteProgress(stage, num_bytes, num_tensors=num_tensors, quiet=self.quiet)

    def advance(self, num_bytes: int, num_tensors: int = 0) -> None:
        self._progress.advance(num_bytes, num_tensors)

    def note(self, text: str) -> None:
        if self.with_notes:
            print_note(text)


def run(options: QuantizeOptions) -> int:
    """Quantise, and say what was written."""
    from flux_nf4.pipeline.quantization import quantize_checkpoint
    from flux_nf4.pipeline.quantizer import QuantizationSettings

    started_s = time.monotonic()
    destination = options.destination_path
    report = _error_report(options, destination)
    settings = QuantizationSettings(
        format=options.format,
        layout=options.layout,
        block_size=int(options.block_size),
        scale=options.scale,
        t5=options.t5_dtype,
        device=options.device,
    )
    with_notes = not (options.quiet or options.json)
    try:
        with _ConsoleWatcher(quiet=options.quiet, with_notes=with_notes) as watcher:
            done = quantize_checkpoint(
                options.source_path,
                options.part_paths,
                destination,
                settings,
                watcher=watcher,
                replace=options.force,
                report=report,
            )
    except KeyboardInterrupt:
        print_note("what is done is kept, and the same command goes on from there")
        raise
    if report is not None and report.layers:
        if options.report is not None:
            report.write_json(path_of(options.report))
        if options.plot is not None:
            report.plot(path_of(options.plot))
    _tell(options, done, report, time.monotonic() - started_s)
    return 0


def _error_report(options: QuantizeOptions, destination: Path) -> ErrorReport | None:
    """An empty report, where one is asked for, once it is sure that it can be written."""
    if options.report is None and options.plot is None:
        return None
    from flux_nf4.pipeline.quantization_report import ErrorReport, check_plot_path

    models = [destination, *map(Path, options.part_paths.values())]
    if options.source_path is not None:
        models.append(Path(options.source_path))
    for name in (options.report, options.plot):
        if name is not None:
            _check_report_path(path_of(name), models)
    if options.plot is not None:
        check_plot_path(options.plot)
    return ErrorReport(scale=options.scale)


def _check_report_path(path: Path, models: Iterable[Path]) -> None:
    """Say now what would be said when all else is done."""
    if not path.parent.is_dir():
        raise InputError(f"there is no folder for `{path}`", hint="make the folder first")
    if path.exists() and not path.is_file():
        raise InputError(f"`{path}` is not a regular file", hint="give the name of a file to write")
    if path.resolve() in {model.resolve() for model in models}:
        raise InputError(f"`{path}` is the model itself", hint="give the report another name")
    check_permission(path.parent, hint="write the report elsewhere")


def _tell(
    options: QuantizeOptions, done: Quantized, report: ErrorReport | None, passed_s: float
) -> None:
    from flux_nf4.formats.manifest import manifest_path

    error = report.total.relative_rmse if report is not None and report.layers else None
    if options.json:
        print_json(
            {
                "destination": str(done.path),
                "manifest": str(manifest_path(done.path)),
                "layout": options.layout,
                "format": options.format,
                "block_size": int(options.block_size),
                "scale": options.scale,
                "device": done.device,
                "bytes": done.num_bytes,
                "tensors": done.num_tensors,
                "kept_tensors": done.num_kept,
                "relative_rmse": error,
                "files": [
                    {
                        "file": name or done.path.name,
                        "bytes": hashes.num_bytes,
                        "sha256": hashes.sha256,
                    }
                    for name, hashes in done.files.items()
                ],
                "notes": list(done.notes),
                "seconds": round(passed_s, 3),
            },
            indent=2,
        )
    elif not options.quiet:
        said = "" if error is None else f", relative RMSE {error:.2%}"
        size = num_bytes_text(done.num_bytes)
        print_data(f"{done.path}  {size} in {duration(passed_s)}{said}")


VERB = Verb(
    name="quantize",
    summary="Quantise the weights of a model to NF4.",
    options=QuantizeOptions,
    run=run,
    examples=(
        "FLUX.1-dev flux1-dev-nf4.safetensors --scale search",
        "flux1-dev.safetensors t.safetensors --layout transformer-only",
        "all.safetensors --transformer flux1-dev.safetensors \\\n"
        "    --t5 t5xxl.safetensors --clip clip_l.safetensors --vae ae.safetensors",
    ),
    note="Stopped at any moment, the same command goes on. A manifest with the sha256\n"
    "of everything is written beside DST; `flux-nf4 verify --sha256` reads it.",
)
