"""`flux-nf4 bench`: how fast a model draws on this machine, against its ceilings and its peers."""

from __future__ import annotations

import gc
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flux_nf4.cli.console import print_data, print_json, print_note, print_plain
from flux_nf4.cli.findings import counted
from flux_nf4.cli.generate import requested_size
from flux_nf4.cli.options import option
from flux_nf4.cli.paths import check_permission, model_path, path_of
from flux_nf4.cli.progress import make_progress
from flux_nf4.cli.verb import Verb, debug_option, json_option
from flux_nf4.errors import DiskError, InputError
from flux_nf4.memory.amounts import memory_text, parse_limit
from flux_nf4.pipeline.limits import default_steps

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from flux_nf4.cli.generate import Size
    from flux_nf4.cli.progress import Progress
    from flux_nf4.formats.checkpoint import Checkpoint
    from flux_nf4.pipeline.events import Event
    from flux_nf4.pipeline.load import LoadSettings, Model

_STAGES = ("prepare", "text", "modulation", "denoise", "decode", "png")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """The options of `bench`."""

    model: str | None = option(
        "-m",
        "--model",
        metavar="PATH",
        help="checkpoint file or folder [`demo`, built in]",
        group="Model",
    )
    random: Literal["flux1-dev", "flux1-schnell", "tiny"] | None = option(
        "--random",
        metavar="NAME",
        help="random weights in its place, nothing to download:\n"
        "`flux1-dev`, `flux1-schnell`, or `tiny`: as the demo",
        group="Model",
    )
    device: str = option(
        "--device",
        metavar="NAME",
        default="auto",
        help="`cpu`, `cuda`, `cuda:1`, ... [auto]",
        group="Model",
    )
    arithmetic: Literal["auto", "bf16", "fp8", "int8"] = option(
        "--arithmetic",
        metavar="NAME",
        default="bf16",
        help="`bf16`: exact; `fp8`, `int8`; `auto`: the fastest [bf16]",
        group="Model",
    )
    attention: Literal["exact", "fp8", "int8"] = option(
        "--attention",
        metavar="NAME",
        default="exact",
        help="`exact`; in 8 bits: `fp8`, `int8` [exact]",
        group="Model",
    )
    vram: str | None = option(
        "--vram",
        metavar="SIZE",
        help="device memory to stay within: 6GB, ... [what is free]",
        group="Model",
    )
    size: str | None = option(
        "-s",
        "--size",
        metavar="WxH",
        help="in pixels, multiples of 16 [the model's own]",
        group="What to draw",
    )
    steps: int | None = option(
        "--steps",
        metavar="N",
        minimum=1,
        maximum=1000,
        help="denoising steps [20; FLUX.1-schnell: 4]",
        group="What to draw",
    )
    batch: int = option(
        "-n",
        "--batch",
        metavar="N",
        default=1,
        minimum=1,
        maximum=64,
        help="images at once [1]",
        group="What to draw",
    )
    compare: bool = option(
        "--compare",
        default=False,
        help="then run what is installed of Diffusers, and of\n"
        "bitsandbytes in it, on the same weights",
        group="What to draw",
    )
    output: str | None = option(
        "-o", "--output", metavar="FILE", help="append the results, a line each", group="Output"
    )
    quiet: bool = option(
        "-q", "--quiet", default=False, help="print nothing but results and errors", group="Output"
    )
    json: bool = json_option()
    debug: bool = debug_option()


def run(options: BenchOptions) -> int:
    """Measure ourselves, then the peers, and print a line of JSON each, or one report."""
    if options.model is not None and options.random is not None:
        raise InputError("`--model` and `--random` are two models", hint="give one of them")
    if options.compare and importlib.util.find_spec("diffusers") is None:
        raise InputError(
            "`--compare` runs Diffusers, which is not installed",
            hint="install it with `pip install 'flux-nf4[compare]'`",
        )
    size = requested_size(options.size)
    output = _output(options.output)
    records = []
    for record in _measured(options, size):
        records.append(record)
        if output is not None:
            from flux_nf4.cli.bench_record import append_record

            append_record(output, record)
        if options.json:
            print_json(record)
    if not options.json:
        print_data("\n".join(report(records)))
    return 0


def _output(name: str | None) -> Path | None:
    if name is None:
        return None
    path = path_of(name)
    if not path.parent.is_dir():
        raise DiskError(f"there is no folder `{path.parent}`", hint="make it, or write elsewhere")
    if path.is_dir():
        raise DiskError(f"`{path}` is a folder", hint="name a file in it")
    check_permission(path if path.exists() else path.parent, hint="write elsewhere")
    return path


def _measured(options: BenchOptions, asked: Size) -> Iterator[dict[str, Any]]:
    """A record of ours, then one of each peer; the model is let go of in between."""
    from flux_nf4.cli.bench_record import environment

    checkpoint = _checkpoint(options)
    with make_progress(quiet=options.quiet) as progress:
        shared, device, drawing = _drawing(options, checkpoint, asked, progress)
    shared |= environment(device.type, device.index or 0)
    yield shared | drawing
    if options.compare:
        for peer in _peers(options, checkpoint, shared["settings"], device):
            yield shared | peer


def _checkpoint(options: BenchOptions) -> Checkpoint:
    from flux_nf4.formats.checkpoint import open_checkpoint
    from flux_nf4.pipeline.load import demo_path
    from flux_nf4.pipeline.random_model import random_checkpoint

    if options.random is not None:
        return random_checkpoint(options.random)
    return open_checkpoint(model_path(options.model) or demo_path())


def _drawing(
    options: BenchOptions,
    checkpoint: Checkpoint,
    asked: Size,
    progress: Progress,
) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """What all records share, the device, and our own record."""
    import torch

    from flux_nf4.cli.bench_record import drawing_record
    from flux_nf4.pipeline.benchmark import measure_drawing, num_requests
    from flux_nf4.pipeline.load import LoadSettings
    from flux_nf4.pipeline.threads import suited_num_threads

    progress.stage("load")
    wish = LoadSettings(
        device=options.device,
        vram=parse_limit(options.vram, "--vram"),
        arithmetic=options.arithmetic,
        attention=options.attention,
    )
    began_s = time.perf_counter()
    model, (width, height) = _loaded(checkpoint, wish, asked)
    load_s = time.perf_counter() - began_s
    steps = options.steps or default_steps(model.variant)
    threads = suited_num_threads(model, width, height, otherwise=torch.get_num_threads())
    torch.set_num_threads(threads)
    for note in model.notes if not options.quiet else ():
        print_note(note)
    progress.plan(num_requests(steps), steps)
    measured = measure_drawing(
        model,
        size=(width, height),
        num_steps=steps,
        batch_size=options.batch,
        on_event=_Follower(progress, options.quiet).follow,
    )
    settings = {
        "width": width,
        "height": height,
        "steps": steps,
        "batch": options.batch,
        "arithmetic": model.arithmetic,
        "attention": options.attention,
        "dtype": str(model.dtype).removeprefix("torch."),
        "vram": wish.vram,
        "text_tokens": model.facts.max_sequence_length,
        "threads": threads if model.device.type == "cpu" else None,
    }
    return (
        {"model": _model_facts(model, options.random), "settings": settings},
        model.device,
        drawing_record(f"flux-nf4 {model.arithmetic}", load_s, measured),
    )


def _loaded(
    checkpoint: Checkpoint, settings: LoadSettings, asked: Size
) -> tuple[Model, tuple[int, int]]:
    """The model, warm where that repays, and the size of its images."""
    from flux_nf4.pipeline.load import assemble_model
    from flux_nf4.pipeline.warm_up import repays, warm_up

    model = assemble_model(checkpoint, settings)
    own = model.facts.default_size
    size = asked.width or own, asked.height or own
    if repays(model.device):
        warm_up(model, size=size)
    return model, size


def _model_facts(model: Model, random: str | None) -> dict[str, Any]:
    name = model.facts.name
    return {
        "name": name if random is None else f"{name}, random weights",
        "quantization": model.quantization,
        "variant": model.variant,
    }


@dataclass(slots=True)
class _Follower:
    """Passes the pipeline's events on to the progress."""

    progress: Progress
    is_quiet: bool

    def follow(self, event: Event) -> None:
        from flux_nf4.pipeline.events import ImageDone, Notice, StageStarted, StepDone

        if isinstance(event, StageStarted):
            self.progress.stage(event.stage)
        elif isinstance(event, StepDone):
            self.progress.step(event.step, event.num_steps)
        elif isinstance(event, ImageDone) and event.index == 0:
            self.progress.image_done()
        elif isinstance(event, Notice) and not self.is_quiet:
            self.progress.pause()
            print_note(event.message)


def _peers(
    options: BenchOptions, checkpoint: Checkpoint, settings: Mapping[str, Any], device: Any
) -> Iterator[dict[str, Any]]:
    import torch

    from flux_nf4.cli.bench_record import peer_record
    from flux_nf4.model.sizes import flux_config
    from flux_nf4.pipeline.peers import measure_peers, random_inputs

    gc.collect()  # the model is gone, but for cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()
    component = checkpoint.components["transformer"]
    inputs = random_inputs(
        flux_config(component),
        size=(settings["width"], settings["height"]),
        num_text_tokens=settings["text_tokens"],
        batch_size=settings["batch"],
        device=device,
        dtype=getattr(torch, settings["dtype"]),
    )

    def tell(peer: Any) -> None:
        if not options.quiet:
            print_plain(f"measuring {peer.name}")

    yield from map(peer_record, measure_peers(component, inputs, on_peer=tell))


def report(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The records of one run for people; the first is our own."""
    ours = records[0]
    settings, device, ceilings = ours["settings"], ours["device"], ours["ceilings"]
    versions = [f"{name} {version}" for name, version in ours["versions"].items() if version]
    driver = f", driver {device['driver']}" if device.get("driver") else ""
    batch = f", {settings['batch']} at once" if settings["batch"] > 1 else ""
    title = (
        f"{ours['model']['name']} {ours['model']['quantization']}: {settings['width']} x "
        f"{settings['height']}, {counted(settings['steps'], 'step')}{batch}"
    )
    head = ("", "a step", "p20", "p80", "", "memory")
    rows = [head, *(_row(record, ours["step"]["median"]) for record in records)]
    rates = (
        f"{ceilings['products_per_s'] / 1e12:.3g} TFLOP/s in products, "
        f"{ceilings['attention_per_s'] / 1e12:.3g} in attention, "
        f"{ceilings['copy_bytes_per_s'] / 1e9:.3g} GB/s copied"
    )
    return [
        title,
        f"{device['name']}{driver}",
        ", ".join(versions),
        "",
        *_aligned(rows),
        "",
        *_aligned(_stage_rows(ours)),
        "",
        f"measured ceilings: {rates}; at them a step takes "
        f"{_time(ceilings['products_s'] + ceilings['attention_s'])}, {100 * ours['share']:.0f} % "
        "of ours",
    ]


def _row(record: Mapping[str, Any], ours_s: float) -> tuple[str, ...]:
    step = record["step"]
    if step is None:
        return (record["name"], record["error"], "", "", "", "")
    factor = f"{step['median'] / ours_s:.2f} x ours" if record["kind"] == "peer" else ""
    times = (_time(step[key]) for key in ("median", "p20", "p80"))
    return (record["name"], *times, factor, _peak_text(record))


def _peak_text(record: Mapping[str, Any]) -> str:
    """The peak of a step: of the denoise stage in ours."""
    peak = record.get("peak") or record.get("warm", {}).get("peaks", {}).get("denoise")
    if not peak:
        return ""
    texts = (f"{memory_text(peak[kind])} {kind}" for kind in ("allocated", "reserved", "driver"))
    return ", ".join(texts)


def _stage_rows(ours: Mapping[str, Any]) -> list[tuple[str, ...]]:
    first, warm = ours["first"], ours["warm"]
    stages = (
        (stage, *(_time(drawn["stages_s"].get(stage, 0)) for drawn in (first, warm)))
        for stage in _STAGES
    )
    total = ("prompt to PNG", _time(first["total_s"]), _time(warm["total_s"]))
    return [("", "first image", "later"), ("load", _time(ours["load_s"]), ""), *stages, total]


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


VERB = Verb(
    name="bench",
    summary="Measure speed and memory, beside what the device can do.",
    options=BenchOptions,
    run=run,
    examples=(
        "",
        "--random flux1-dev --arithmetic auto --steps 28",
        "-m MODEL --compare -o a.jsonl",
    ),
    note="The first image is drawn cold; the steps that count are those of later ones.",
)
