"""`flux-nf4 info`: what a checkpoint holds, or how an image was made. Reads headers only."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_nf4.cli.console import print_data, print_json, printable, styled
from flux_nf4.cli.findings import num_bytes_text
from flux_nf4.cli.model_checks import PART_NAMES
from flux_nf4.cli.options import argument
from flux_nf4.cli.paths import path_of
from flux_nf4.cli.verb import Verb, debug_option, json_option
from flux_nf4.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from flux_nf4.formats.survey import Survey
    from flux_nf4.pipeline.image_metadata import ImageRecord

_IMAGE_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")
_COLUMN = 14
_DEMO_NAME = "flux-demo"  # what the built-in demo model calls itself


@dataclass(frozen=True, slots=True, kw_only=True)
class InfoOptions:
    """The options of `info`."""

    path: str | None = argument("PATH", help="a checkpoint (file or folder), or an image")
    json: bool = json_option()
    debug: bool = debug_option()


def run(options: InfoOptions) -> int:
    """Tell what is at a path."""
    if options.path is None:
        raise InputError(
            "no path is given", hint="name a checkpoint or an image: `flux-nf4 info PATH`"
        )
    path = path_of(options.path)
    described = _describe_image(path) if _is_image(path) else _describe_checkpoint(path)
    if options.json:
        print_json(described.values, indent=2)
    else:
        print_data("\n".join(printable(line) for line in described.lines))
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """The same twice: for programs, and for people."""

    values: Mapping[str, Any]
    lines: tuple[str, ...]


def _is_image(path: Path) -> bool:
    try:
        if not path.is_file():  # a folder, a pipe, or nothing: opening a checkpoint says which
            return False
        with path.open("rb") as file:
            return file.read(8).startswith(_IMAGE_SIGNATURES)
    except OSError:
        return False


def _describe_checkpoint(path: Path) -> Description:
    from flux_nf4.formats.survey import survey

    surveyed = survey(path)
    parts = [
        {
            "part": kind,
            "source": str(part.source),
            "bytes": part.num_bytes,
            "stored": {
                form: {"tensors": num_tensors, "bytes": num_bytes}
                for form, (num_tensors, num_bytes) in part.stored.items()
            },
        }
        for kind, part in surveyed.parts.items()
    ]
    values = {
        "kind": "checkpoint",
        "path": str(surveyed.path),
        "layout": surveyed.layout,
        "variant": surveyed.variant,
        "told_by_name": surveyed.told_by_name,
        "quantization": surveyed.quantization,
        "bytes": sum(part.num_bytes for part in surveyed.parts.values()),
        "parts": parts,
        "missing": list(surveyed.missing),
        "facts": dataclasses.asdict(surveyed.facts),
        "notes": list(surveyed.notes),
    }
    return Description(values=values, lines=tuple(_checkpoint_lines(surveyed, values)))


def _checkpoint_lines(surveyed: Survey, values: Mapping[str, Any]) -> list[str]:
    facts = surveyed.facts
    by_name = f"; by its name {surveyed.told_by_name}" if surveyed.told_by_name else ""
    lines = [
        surveyed.path.name or str(surveyed.path),
        *_rows(
            {
                "model": f"FLUX.1 {surveyed.variant} ({facts.name}){by_name}",
                "layout": surveyed.layout,
                "weights": surveyed.quantization,
                "size": num_bytes_text(values["bytes"]),
                "licence": facts.licence,
                "draws": f"{facts.default_size} x {facts.default_size} pixels by itself, prompts "
                f"of up to {facts.max_sequence_length} tokens",
            }
        ),
        "",
        f"  {'part':<{_COLUMN}}{'stored as':<12}{'tensors':>8}{'bytes':>18}",
    ]
    for part in values["parts"]:
        name = PART_NAMES[part["part"]]
        for form, stored in part["stored"].items():
            lines.append(
                f"  {name:<{_COLUMN}}{form:<12}{stored['tensors']:>8,}{stored['bytes']:>18,}"
            )
            name = ""
    lacking = (f"  {PART_NAMES[kind]:<{_COLUMN}}missing" for kind in surveyed.missing)
    return [*lines, *lacking, *(f"  note: {note}" for note in surveyed.notes)]


def _describe_image(path: Path) -> Description:
    from flux_nf4.pipeline.image_metadata import read_image

    record = read_image(path)
    settings = record.settings
    command = _command(path, record)
    values = {
        "kind": "image",
        "path": str(path),
        "width": record.width,
        "height": record.height,
        "is_declared_generated": record.is_declared_generated,
        "settings": dataclasses.asdict(settings) if settings else None,
        "parameters": record.parameters,
        "command": command,
    }
    return Description(values=values, lines=tuple(_image_lines(path, record, command)))


def _image_lines(path: Path, record: ImageRecord, command: str) -> list[str]:
    if record.settings is not None:
        shown: dict[str, object] = dataclasses.asdict(record.settings)
        origin = f"made by flux-nf4 {shown.pop('version')}"
    else:
        shown = dict(record.pairs)
        origin = "with settings as A1111 writes them" if shown else "without settings in it"
    lines = [f"{path.name}: {record.width} x {record.height} pixels, {origin}"]
    lines += _rows({name.replace("_", " "): value for name, value in shown.items()})
    if command:
        lines += ["", "again:", f"  {command}"]
    return lines


def _rows(values: Mapping[str, object]) -> Iterable[str]:
    width = max((len(name) for name in values), default=0) + 2
    for name, value in values.items():
        if value not in ("", None):
            yield f"  {styled(f'{name:<{width}}', 'dim')}{value}"


def _command(path: Path, record: ImageRecord) -> str:
    """The command that makes the image once more; a model of one's own by its name."""
    settings, pairs = record.settings, record.pairs
    if settings is None and not pairs.get("Prompt"):
        return ""
    model = settings.model if settings else pairs.get("Model", "MODEL")
    words = ["flux-nf4", "generate", "--from", str(path)]
    if settings and settings.strength is not None:
        words += ["--image", "PATH/TO/IMAGE"]
    return shlex.join([*words, "-m", "demo" if model == _DEMO_NAME else f"PATH/TO/{model}"])


VERB = Verb(
    name="info",
    summary="Show what a checkpoint holds, or how an image was made.",
    options=InfoOptions,
    run=run,
    examples=("flux1-dev-bnb-nf4-v2.safetensors", "outputs/a-red-apple-7.png --json"),
)
