"""`flux-nf4 convert`: any checkpoint, or parts of several, in any other layout."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flux_nf4.cli.byte_progress import ByteProgress
from flux_nf4.cli.console import print_data, print_json, print_note
from flux_nf4.cli.findings import num_bytes_text
from flux_nf4.cli.options import argument, option
from flux_nf4.cli.paths import path_of
from flux_nf4.cli.progress import duration
from flux_nf4.cli.verb import Verb, debug_option, json_option
from flux_nf4.errors import InputError

if TYPE_CHECKING:
    from flux_nf4.formats.component import ComponentKind
    from flux_nf4.pipeline.conversion_output import Conversion


def _part_option(kind: str) -> Any:
    return option(
        f"--{kind}",
        metavar="PATH",
        help=f"take the {PART_WORDS[kind]} from this file or folder",
        group="Parts",
    )


PART_WORDS = {
    "transformer": "transformer",
    "t5": "T5 text encoder",
    "clip": "CLIP text encoder",
    "vae": "VAE",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """What is read and what is written, for verbs that make a checkpoint of another."""

    source: str | None = argument("SRC", help="a checkpoint: file or folder")
    destination: str | None = argument("DST", help="the file or folder to write")
    transformer: str | None = _part_option("transformer")
    t5: str | None = _part_option("t5")
    clip: str | None = _part_option("clip")
    vae: str | None = _part_option("vae")

    def __post_init__(self) -> None:
        if self.source is None or (self.destination is None and not self.part_paths):
            raise InputError(
                "no source or no destination is given",
                hint="name both: `SRC DST`; with parts alone the one path is DST",
            )

    @property
    def part_paths(self) -> dict[ComponentKind, str]:
        """Where parts are taken from, where that is said."""
        paths: dict[ComponentKind, str | None] = {
            "transformer": self.transformer,
            "t5": self.t5,
            "clip": self.clip,
            "vae": self.vae,
        }
        return {kind: str(path_of(path)) for kind, path in paths.items() if path is not None}

    @property
    def source_path(self) -> str | None:
        """The checkpoint, where there is one beside parts."""
        # With parts alone there is no SRC: the one path given is DST.
        if self.source is None or self.destination is None:
            return None
        return str(path_of(self.source))

    @property
    def destination_path(self) -> Path:
        """Where the result goes."""
        given = self.source if self.destination is None else self.destination
        return path_of(given or "")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions(SourceOptions):
    """The options of `convert`."""

    layout: Literal["all-in-one", "transformer-only", "diffusers"] = option(
        "--layout",
        metavar="NAME",
        default="all-in-one",
        help="`all-in-one`, `transformer-only` or `diffusers`\n[all-in-one]",
        group="Output",
    )
    parts: bool = option(
        "--parts",
        default=False,
        help="a folder with one file for each part",
        group="Output",
    )
    format: Literal["keep", "v2", "bf16"] = option(
        "--format",
        metavar="NAME",
        default="keep",
        help="the weights: as they are (`keep`), absmax un-nested\n"
        "(`v2`, exact), or expanded (`bf16`) [keep]",
        group="Output",
    )
    force: bool = option(
        "--force", default=False, help="replace what is there already", group="Output"
    )
    quiet: bool = option(
        "-q", "--quiet", default=False, help="print nothing but errors", group="Output"
    )
    json: bool = json_option()
    debug: bool = debug_option()

    def __post_init__(self) -> None:
        if self.parts and self.layout != "all-in-one":
            raise InputError(
                f"`--parts` and `--layout {self.layout}` are two layouts", hint="give one of them"
            )
        SourceOptions.__post_init__(self)  # `super()` knows no class with slots


def run(options: ConvertOptions) -> int:
    """Convert, and say what was written."""
    from flux_nf4.pipeline.conversion import gather, plan_conversion

    started_s = time.monotonic()
    destination = options.destination_path
    gathered = gather(options.source_path, options.part_paths)
    layout = "parts" if options.parts else options.layout
    conversion = plan_conversion(gathered, layout=layout, form=options.format)
    if not options.quiet and not options.json:
        for note in conversion.notes:
            print_note(note)
    with ByteProgress("writing", conversion.data_bytes, quiet=options.quiet) as progress:
        conversion.write(destination, replace=options.force, on_bytes=progress.advance)
    _report(options, conversion, destination, layout, time.monotonic() - started_s)
    return 0


def _report(
    options: ConvertOptions,
    conversion: Conversion,
    destination: Path,
    layout: str,
    passed_s: float,
) -> None:
    if options.json:
        print_json(
            {
                "destination": str(destination),
                "layout": layout,
                "format": options.format,
                "bytes": conversion.num_bytes,
                "files": [
                    {"file": name or destination.name, "bytes": file.num_bytes}
                    for name, file in conversion.files.items()
                ],
                "sources": [str(path) for path in conversion.sources],
                "notes": list(conversion.notes),
                "seconds": round(passed_s, 3),
            },
            indent=2,
        )
    elif not options.quiet:
        size = num_bytes_text(conversion.num_bytes)
        print_data(f"{destination}  {size} in {duration(passed_s)}")


VERB = Verb(
    name="convert",
    summary="Write a checkpoint in another layout, exactly.",
    options=ConvertOptions,
    run=run,
    examples=(
        "flux1-dev-bnb-nf4.safetensors v2.safetensors --format v2",
        "v2.safetensors flux1-dev --layout diffusers",
        "all.safetensors --transformer flux.safetensors \\\n"
        "    --t5 t5xxl.safetensors --clip clip_l.safetensors --vae ae.safetensors",
    ),
    note="With parts alone the one path is DST. NF4 never passes through bf16.",
)
