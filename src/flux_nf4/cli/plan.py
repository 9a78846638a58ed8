"""`flux-nf4 plan`: what fits into how much memory, and how fast; no GPU and no model needed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_nf4.cli.console import print_data, print_json, printable
from flux_nf4.cli.findings import counted
from flux_nf4.cli.generate import requested_size
from flux_nf4.cli.options import option
from flux_nf4.cli.paths import path_of
from flux_nf4.cli.verb import Verb, debug_option, json_option
from flux_nf4.errors import DoesNotFitError, InputError
from flux_nf4.memory.amounts import memory_text, parse_memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flux_nf4.memory.activations import Workload
    from flux_nf4.memory.budget import Budget, Machine
    from flux_nf4.memory.inventory import Inventory
    from flux_nf4.memory.placement import Placement, Plan

_OVERVIEW = ("2GB", "4GB", "6GB", "8GB", "12GB", "16GB", "24GB")
# What a copy from pinned memory reaches: 80 % of the link's rate.
_LINKS = {"PCIe 3.0 x16": 12_600, "PCIe 4.0 x8": 12_600, "PCIe 4.0 x16": 25_200}  # MB/s
_DEMO = "flux-demo-nf4-v2.safetensors"  # as in `pipeline.load`, which would import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """The options of `plan`."""

    model: str | None = option(
        "-m",
        "--model",
        metavar="PATH",
        help="checkpoint, of which only headers are read\n[FLUX.1-dev in NF4 v2; no file needed]",
        group="Model",
    )
    vram: str | None = option(
        "--vram",
        metavar="SIZE",
        help="memory of the card: 6GB, 6144MB, ..., or `auto`\n[an overview from 2 GB to 24 GB]",
    )
    ram: str | None = option(
        "--ram",
        metavar="SIZE",
        help="main memory that weights may take\n[as they need; with `--vram auto` what is free]",
    )
    size: str | None = option(
        "-s",
        "--size",
        metavar="WxH",
        help="in pixels, multiples of 16 [the model's own]",
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
    steps: int | None = option(
        "--steps",
        metavar="N",
        minimum=1,
        maximum=1000,
        help="denoising steps [20; FLUX.1-schnell: 4]",
        group="What to draw",
    )
    json: bool = json_option()
    debug: bool = debug_option()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """A plan for one budget, or why there is none."""

    vram: str
    budget: Budget
    plan: Plan | None
    error: DoesNotFitError | None


def run(options: PlanOptions) -> int:
    """Print the plan; 5 where the one budget that was given does not do."""
    from flux_nf4.memory.budget import Machine

    inventory, workload, notes = _subject(options)
    machine = Machine()
    if options.vram is None:
        outcomes = [_outcome(text, options, inventory, workload, machine) for text in _OVERVIEW]
    else:
        outcomes = [_outcome(options.vram, options, inventory, workload, machine)]
        if outcomes[0].error is not None and not options.json:
            raise outcomes[0].error
    if options.json:
        values = [_values(outcome, machine) for outcome in outcomes]
        described = {"model": inventory.name, "workload": dataclasses.asdict(workload)}
        print_json({**described, "notes": notes, "plans": values}, indent=2)
    else:
        title = f"{inventory.name}: {_workload_text(workload)}"
        lines = (
            _overview(outcomes, machine) if options.vram is None else _detail(outcomes[0], machine)
        )
        print_data("\n".join(map(printable, (title, "", *lines, *(f"note: {n}" for n in notes)))))
    is_lacking = options.vram is not None and outcomes[0].error is not None
    return DoesNotFitError.exit_code if is_lacking else 0


def _subject(options: PlanOptions) -> tuple[Inventory, Workload, list[str]]:
    from flux_nf4.formats.facts import FLUX_1_DEV
    from flux_nf4.memory.activations import Workload
    from flux_nf4.memory.checkpoint_inventory import flux_1_dev, read_inventory
    from flux_nf4.pipeline.limits import check_size, default_steps

    facts, notes, variant = FLUX_1_DEV, [], "dev"
    if options.model is None:
        inventory = flux_1_dev()
    else:
        inventory, surveyed = read_inventory(_model_path(options.model))
        facts, variant = surveyed.facts, surveyed.variant
        if surveyed.missing:
            lacking = ", ".join(surveyed.missing)
            notes.append(f"the checkpoint lacks {lacking}: planned with FLUX.1-dev's")
    size = requested_size(options.size)
    width, height = size.width or facts.default_size, size.height or facts.default_size
    check_size(width, height)
    workload = Workload(
        width=width,
        height=height,
        num_images=options.batch,
        num_steps=options.steps or default_steps(variant),
        num_text_tokens=facts.max_sequence_length,
    )
    return inventory, workload, notes


def _model_path(model: str) -> Path:
    if model == "demo":
        return Path(str(resources.files("flux_nf4"))) / "assets" / "demo" / _DEMO
    return path_of(model)


def _outcome(
    vram: str, options: PlanOptions, inventory: Inventory, workload: Workload, machine: Machine
) -> _Outcome:
    from flux_nf4.memory.budget import Budget
    from flux_nf4.memory.host import HostMemory, measure_host
    from flux_nf4.memory.plan import make_plan

    is_auto = vram == "auto"
    host = measure_host() if is_auto else HostMemory(free=None, total=None)
    host_bytes = host.for_weights(inventory.num_bytes)
    budget = Budget(
        device_bytes=_free_bytes() if is_auto else parse_memory(vram, "--vram"),
        host_bytes=host_bytes if options.ram is None else parse_memory(options.ram, "--ram"),
        pinned_bytes=host.for_pinning,
    )
    shown = f"the free {memory_text(budget.device_bytes)}" if is_auto else vram
    try:
        plan = make_plan(inventory, workload, budget, machine)
    except DoesNotFitError as error:
        return _Outcome(vram=shown, budget=budget, plan=None, error=error)
    return _Outcome(vram=shown, budget=budget, plan=plan, error=None)


def _free_bytes() -> int:
    """What is free on the first card, less room for the desktop."""
    from flux_nf4.cli.accelerators import inspect_torch
    from flux_nf4.memory.budget import DESKTOP_BYTES

    cards = inspect_torch().cards
    if not cards:
        raise InputError(
            "`--vram auto` asks the GPU, and PyTorch finds none here",
            hint="name an amount: `--vram 6GB`",
        )
    return max(cards[0].free - DESKTOP_BYTES, 0)


def _workload_text(workload: Workload) -> str:
    steps, images = counted(workload.num_steps, "step"), counted(workload.num_images, "image")
    return f"{workload.width} x {workload.height}, {steps}, {images}"


def _overview(outcomes: Sequence[_Outcome], machine: Machine) -> list[str]:
    titles = ("memory", "peak", "blocks on it", "moves a step", "on the bus, s", "kept")
    rows: list[tuple[str, ...]] = [titles]
    for outcome in outcomes:
        plan = outcome.plan
        if plan is None:
            rows.append((outcome.vram, "does not fit", *("" for _ in titles[2:])))
            continue
        blocks = _blocks(plan)
        num_resident = sum(each.use != "streamed" for each in blocks)
        rows.append(
            (
                outcome.vram,
                memory_text(plan.peak_bytes),
                f"{num_resident} of {len(blocks)}",
                memory_text(plan.step_bytes),
                " ".join(f"{seconds:.2f}" for seconds in _link_seconds(plan).values()),
                _kept_text(plan),
            )
        )
    hints = dict.fromkeys(str(outcome.error.hint) for outcome in outcomes if outcome.error)
    plans = [outcome.plan for outcome in outcomes if outcome.plan]
    return [
        *_table(rows),
        "",
        *(f"what does not fit: {hint}" for hint in hints),
        "kept: for the next image, which then loads nothing of it",
        *(_basis(plans[0], machine) if plans else ()),
    ]


def _detail(outcome: _Outcome, machine: Machine) -> list[str]:
    plan = outcome.plan
    assert plan is not None
    rows = [("phase", "resident", "in turns", "working", "peak", "moved", "modelled")]
    for phase in plan.phases:
        ring = f"{phase.ring.num_slots} x {memory_text(phase.ring.slot_bytes)}"
        rows.append(
            (
                phase.name,
                memory_text(phase.resident_bytes),
                ring if phase.ring.num_bytes else "-",
                memory_text(phase.working_bytes),
                memory_text(phase.peak_bytes),
                memory_text(phase.moved_bytes),
                _seconds(phase.predicted_ns / 1e9),
            )
        )
    homes = {"pinned": "pinned", "pageable": "pageable", "file": "left in the file"}
    held = [f"{memory_text(plan.bytes_in(home))} {text}" for home, text in homes.items()]  # type: ignore[arg-type]
    uses = {
        "kept": "kept from image to image",
        "loop": "loaded in the first step",
        "streamed": "streamed in every step",
    }
    counts = {text: sum(each.use == use for each in _blocks(plan)) for use, text in uses.items()}
    steps = [f"{link} {_seconds(seconds)}" for link, seconds in _step_seconds(plan).items()]
    return [
        *_table(rows),
        f"peaks are of the whole process: {memory_text(plan.budget.context_bytes)} for CUDA's "
        "context are in them",
        "",
        f"blocks  {', '.join(f'{count} {text}' for text, count in counts.items() if count)}",
        f"kept    {_kept_text(plan)}",
        f"host    {', '.join(held)}",
        f"a step  moves {memory_text(plan.step_bytes)} for {plan.batch_size} at once; "
        f"{', '.join(steps)}",
        *_basis(plan, machine),
        "",
        _verdict(outcome.vram, plan),
    ]


def _basis(plan: Plan, machine: Machine) -> list[str]:
    """What the modelled times rest on."""
    arithmetic = _seconds(plan.compute_ns / 1e9)
    return [
        f"modelled for {', '.join(_LINKS)} at 80 % of their rate; a step takes the",
        f"longer of bus and arithmetic ({arithmetic} at {machine.flops_per_s / 1e12:.1f} TFLOP/s, "
        "a laptop's RTX 3070 Ti)",
    ]


def _blocks(plan: Plan) -> list[Placement]:
    return [each for each in plan.placements if each.unit.name.startswith("blocks.")]


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


def _step_seconds(plan: Plan) -> dict[str, float]:
    return {
        link: max(seconds, plan.compute_ns / 1e9) for link, seconds in _link_seconds(plan).items()
    }


def _link_seconds(plan: Plan) -> dict[str, float]:
    return {link: plan.step_bytes / (rate * 1e6) for link, rate in _LINKS.items()}


def _kept_text(plan: Plan) -> str:
    """The networks that stay on the device, and of one that does so in part how much."""
    networks = {
        "blocks": "blocks",
        "vae": "VAE",
        "conditioner": "modulation",
        "clip": "CLIP",
        "t5": "T5",
    }
    found = []
    for name, shown in networks.items():
        units = [each for each in plan.placements if each.unit.name.split(".")[0] == name]
        units = [each for each in units if each.use != "looked up"]
        num_kept = sum(each.use == "kept" for each in units)
        if num_kept:
            found.append(shown if num_kept == len(units) else f"{num_kept}/{len(units)} of {shown}")
    is_all = found == list(networks.values())
    return "everything" if is_all else ", ".join(found) or "nothing"


def _verdict(vram: str, plan: Plan) -> str:
    if not plan.step_bytes:
        return f"fits {vram} with nothing streamed per step"
    slowest = max(_link_seconds(plan).values())
    hidden = "hidden behind arithmetic" if slowest * 1e9 <= plan.compute_ns else "the step's limit"
    return f"fits {vram}, streaming {memory_text(plan.step_bytes)} a step: {hidden}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_row(row, widths) for row in rows]


def _row(cells: Iterable[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def _values(outcome: _Outcome, machine: Machine) -> dict[str, Any]:
    """One budget's answer for programs: bytes and seconds."""
    plan, error = outcome.plan, outcome.error
    if plan is None:
        assert error is not None
        why = {"message": error.message, "hint": error.hint}
        return {"device_bytes": outcome.budget.device_bytes, "fits": False, "error": why}
    return {
        "device_bytes": plan.budget.device_bytes,
        "context_bytes": plan.budget.context_bytes,
        "fits": True,
        "verdict": _verdict(outcome.vram, plan),
        "peak_bytes": plan.peak_bytes,
        "batch_size": plan.batch_size,
        "step_bytes": plan.step_bytes,
        "arithmetic_s": plan.compute_ns / 1e9,
        "step_s": _step_seconds(plan),
        "total_s": plan.total_ns / 1e9,
        "machine": dataclasses.asdict(machine),
        "phases": [dataclasses.asdict(phase) for phase in plan.phases],
        "placements": [
            {
                "unit": each.unit.name,
                "bytes": each.unit.num_bytes,
                "home": each.home,
                "use": each.use,
            }
            for each in plan.placements
        ],
    }


VERB = Verb(
    name="plan",
    summary="Tell what fits into how much memory, and how fast.",
    options=PlanOptions,
    run=run,
    examples=("", "--vram 6GB", "--vram 4GB -s 896x1152 --json", "-m flux1-dev.safetensors"),
    note="Exit code 0: it fits. 5: it does not, and what would.",
)
