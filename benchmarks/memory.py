"""Step time and peak under hard caps on memory: `python -m benchmarks.memory OUTPUT.jsonl`.

One line of JSON a case, each in a process of its own; what fails says how, what there was no time
for says so. Random weights at FLUX.1-dev's size, written to this machine's disk first. The cap is
on PyTorch's allocator; beside it stands what the driver counts for the whole device. Cases come in
the order of what matters, and none is begun after `--seconds`:

    loads       from opening the file to the first step, and to the second image; warmed up and not
    caps        the bus, and nf4 v2 from the file under every cap, in both arithmetics
    storages    the other storages in our engine; fp8 and bf16 from files, of which one lies there
    more        896 x 1152, and weights that stay in the file
    peers       Diffusers' own ways, each under the smallest cap that it runs under

Called again with the same output, it goes on: what has been measured is not measured anew.
`--model tiny --device cpu` tries the script where there is no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory_peers
from benchmarks.memory_cases import DTYPES, PARTS, cases, is_known
from flux_nf4.errors import FluxNF4Error
from flux_nf4.formats.allinone import write_all_in_one
from flux_nf4.formats.checkpoint import Checkpoint, open_checkpoint
from flux_nf4.memory.activations import Workload
from flux_nf4.memory.budget import CONTEXT_BYTES
from flux_nf4.memory.checkpoint_inventory import component_entries
from flux_nf4.memory.device import CudaDevice, Device
from flux_nf4.memory.inventory import take_inventory
from flux_nf4.memory.plan import smallest_budget
from flux_nf4.model.sizes import entry_shape
from flux_nf4.pipeline.benchmark import draw
from flux_nf4.pipeline.ceilings import timed_calls
from flux_nf4.pipeline.events import ImageDone, Notice, StepDone
from flux_nf4.pipeline.generate import GenerationRequest, generate
from flux_nf4.pipeline.load import LoadSettings, Model, assemble_model, load_model
from flux_nf4.pipeline.random_model import RandomEntries, random_checkpoint, write_random_model
from flux_nf4.pipeline.warm_up import warm_up

GIB = 2**30
NO_TIME = "not run: no time was left"
_STEPS_OF_AN_IMAGE = 28
_ALIGNMENT_BYTES = 2**20
_BUS_BYTES = 2**28
LINKS = {"PCIe 3.0 x16": 12.6e9, "PCIe 4.0 x8": 12.6e9, "PCIe 4.0 x16": 25.2e9}  # bytes a second


def main() -> None:
    """Write the file, then run every case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="flux1-dev", choices=("flux1-dev", "tiny"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--part", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--folder", type=Path, help="where random weights lie, and stay")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--case", type=json.loads, help="one case, to standard output")
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(run_case(options.case)))
        return
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{options.model}.safetensors"
        if not file.exists():
            write_random_model(file, options.model)
        shared = {"model": options.model, "device": options.device, "steps": options.steps}
        measured = _measured_before(options.output)
        wanted = cases(options.part.split(","), shared)
        for case in wanted:
            if is_known(case, measured, wanted):
                continue
            left = end - time.monotonic()
            places = {"file": str(file), "folder": str(folder)}
            answer = {"error": NO_TIME} if left < 20 else _apart(case | places, left)
            measured.append(case | {"commit": options.commit} | answer)
            with options.output.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(measured[-1]) + "\n")
            print(json.dumps(measured[-1]), flush=True)


def _measured_before(output: Path) -> list[dict[str, Any]]:
    if not output.exists():
        return []
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def _apart(case: dict[str, Any], seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", "-", "--case", json.dumps(case)]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": "not finished: no time was left"}
    lines = ended.stdout.splitlines()
    if ended.returncode or not lines:
        return {"error": (ended.stderr.strip().splitlines() or ["it was killed"])[-1]}
    return dict(json.loads(lines[-1]))


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """One case in this process."""
    is_cuda = case["device"] == "cuda"
    _cap(case)
    measure = {
        "ours": _measure_ours,
        "load": _measure_load,
        "bus": _measure_bus,
        "write": _write,
        "peer": memory_peers.measure,
        "prepare": _prepare_peers,
    }[case["case"]]
    try:
        measured = measure(case)
    except (FluxNF4Error, RuntimeError, ValueError, TypeError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return measured | (_memory() if is_cuda else {})


def _cap(case: dict[str, Any]) -> None:
    if case["device"] == "cuda" and case["cap_gib"] is not None:
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(case["cap_gib"] * GIB / total_bytes)


def _memory() -> dict[str, Any]:
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return {
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "driver_gib": (total_bytes - free_bytes) / GIB,
        "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def _checkpoint(case: dict[str, Any]) -> Checkpoint:
    storage = case["storage"]
    if storage == "file":
        return open_checkpoint(case["file"])
    if storage == "nf4 v1":
        return random_checkpoint(case["model"], form="nf4 v1")
    return open_checkpoint(_storage_file(case, storage))


def _storage_file(case: dict[str, Any], storage: str) -> Path:
    return Path(case["folder"]) / f"{case['model']}-{storage}.safetensors"


def _write(case: dict[str, Any]) -> dict[str, Any]:
    """Write a model in another storage as an all-in-one file, in place of that before it."""
    began, file = time.perf_counter(), _storage_file(case, case["storage"])
    _clear(case, but=file)
    if not file.exists():
        checkpoint = random_checkpoint(case["model"])
        transformer = checkpoint.components["transformer"]
        outlines = {}
        for name in transformer.entries:
            shape = entry_shape(transformer, name)
            dtype = DTYPES[case["storage"]] if len(shape) == 2 else torch.bfloat16
            outlines[name] = torch.empty(shape, dtype=dtype, device="meta")
        entries = {kind: part.entries for kind, part in checkpoint.components.items()}
        entries["transformer"] = RandomEntries(outlines, 0)
        write_all_in_one(file, entries, checkpoint.facts)
    return {"seconds": time.perf_counter() - began, "bytes": file.stat().st_size}


def _clear(case: dict[str, Any], but: Path | None = None) -> None:
    """Make room on the disk, which has none for all storages."""
    for storage in DTYPES:
        file = _storage_file(case, storage)
        if file != but:
            file.unlink(missing_ok=True)


def _prepare_peers(case: dict[str, Any]) -> dict[str, Any]:
    _clear(case)
    return memory_peers.prepare(case)


def _measure_bus(case: dict[str, Any]) -> dict[str, Any]:
    """How fast pinned memory comes to the device."""
    place = torch.device(case["device"])
    device = CudaDevice(place) if place.type == "cuda" else Device(place)
    host, target = device.pin(_BUS_BYTES), device.allocate(_BUS_BYTES)
    host.fill_(1)
    seconds = timed_calls(lambda: target.copy_(host, non_blocking=True), place)
    return {"pinned_bytes_per_s": _BUS_BYTES / statistics.median(seconds)}


def _measure_load(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds from the file to a model that is ready, to its first step, and of its images."""
    began_s = time.perf_counter()
    settings = LoadSettings(device=case["device"], arithmetic=case["arithmetic"])
    model = load_model(case["file"], settings)
    if case["warm_up"]:
        warm_up(model)
    ready_s = time.perf_counter() - began_s
    side = model.facts.default_size
    images = [
        draw(
            model,
            GenerationRequest(
                prompt=f"a fox in the snow, {number}",
                width=side,
                height=side,
                num_inference_steps=_STEPS_OF_AN_IMAGE if case["device"] == "cuda" else 2,
            ),
        )
        for number in range(2)
    ]
    before_s = sum(images[0].stages_s[stage] for stage in ("prepare", "text", "modulation"))
    return {
        "ready_s": ready_s,
        "first_step_s": ready_s + before_s + images[0].steps_s[0],
        "images": [dataclasses.asdict(image) for image in images],
    }


def _measure_ours(case: dict[str, Any]) -> dict[str, Any]:
    cap, is_cuda = case["cap_gib"], case["device"] == "cuda"
    began = time.perf_counter()
    checkpoint = _checkpoint(case)
    vram = None if cap is None or not is_cuda else _budget(checkpoint, case)
    model = assemble_model(
        checkpoint,
        LoadSettings(
            device=case["device"],
            vram=vram,
            ram=case.get("ram"),
            arithmetic=case.get("arithmetic", "bf16"),
        ),
    )
    _cap(case)  # strictly: the model itself leaves some room beside its plan
    opened_s = time.perf_counter() - began
    first = _draw(model, case, "a photo of a harbour at dawn")
    again = _draw(model, case | {"steps": 4}, "a photo of a harbour at dawn")
    other = _draw(model, case, "a fox in the snow")
    plan = model.memory.plan
    streamed = other["step_bytes"]
    return {
        "quantization": model.quantization,
        "arithmetic": model.arithmetic,
        "opened_s": opened_s,
        "first_step_s": opened_s + first["first_step_s"],
        "step_ms": 1000 * statistics.median(other["steps_s"]),
        "first": first,
        "same_prompt": again,
        "new_prompt": other,
        "planned_gib": None if plan is None else model.memory.planned_bytes / GIB,
        "planned_step_bytes": None if plan is None else plan.step_bytes,
        "modelled_bus_ms": {link: 1000 * streamed / rate for link, rate in LINKS.items()},
    }


def _budget(checkpoint: Checkpoint, case: dict[str, Any]) -> int:
    """What to give as `vram`, so that the allocator's own cap, which is less, is the case's.

    Where that is too little it is what the least plan takes, if tensors alone fit under the cap.
    """
    cap_bytes, (width, height) = int(case["cap_gib"] * GIB), case["size"]
    entries = component_entries(checkpoint.components)
    is_eight_bit = case.get("arithmetic", "bf16") != "bf16"
    inventory = take_inventory("", entries, compute_bytes=2, is_eight_bit=is_eight_bit)
    inventory = dataclasses.replace(inventory, is_fused=True)
    least = smallest_budget(inventory, Workload(width=width, height=height))
    least += _ALIGNMENT_BYTES  # of weights in their buffers, which are not made yet
    return max(cap_bytes + CONTEXT_BYTES // 2, min(least, cap_bytes + CONTEXT_BYTES))


def _draw(model: Model, case: dict[str, Any], prompt: str) -> dict[str, Any]:
    residency = model.memory.residency
    moved = 0 if residency is None else residency.moved_bytes
    width, height = case["size"]
    request = GenerationRequest(
        prompt=prompt, width=width, height=height, num_inference_steps=case["steps"], seed=1
    )
    began = last = time.perf_counter()
    steps_s: list[float] = []
    first_step_s, moved_at_first, moved_at_last, notices, digest = 0.0, 0, 0, [], ""
    for event in generate(model, request):
        if isinstance(event, StepDone):
            if case["device"] == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            moved_at_last = 0 if residency is None else residency.moved_bytes
            if not first_step_s:
                first_step_s, moved_at_first = now - began, moved_at_last
            else:
                steps_s.append(now - last)
            last = now
        elif isinstance(event, Notice):
            notices.append(event.message)
        elif isinstance(event, ImageDone):
            digest = hashlib.sha256(event.image.tobytes()).hexdigest()
    return {
        "seconds": time.perf_counter() - began,
        "first_step_s": first_step_s,
        "steps_s": steps_s,
        "step_bytes": (moved_at_last - moved_at_first) / max(1, len(steps_s)),
        "moved_bytes": 0 if residency is None else residency.moved_bytes - moved,
        "notices": notices,
        "sha256": digest,
    }


if __name__ == "__main__":
    main()
