"""What four bits cost: one model in every storage format, judged on prompts training never saw.

    python -m benchmarks.quality                     the table, from the bf16 weights before NF4
    python -m benchmarks.quality --formats shipped   the scores of the model inside the package

The formats are made from the demo model's bf16 weights as they were before training knew of NF4,
because FLUX.1-dev was not made for NF4 either. `shipped` is beside them: the weights inside the
package, trained through NF4. Every format draws the same 2,204 prompts from the same seeds with
the pipeline's own parts. Scores say whether the picture shows what was asked for; they saturate.
PSNR to the exact scene and to the bf16 picture of the same seed is what tells formats apart.

Writes `quality.json`, the table `quality.md` and `quality.png` (six prompts in every format) into
`benchmarks/results`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.quality_report import write_report
from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.model.rope import rope_table
from flux_nf4.nf4.codec import NF4Weight
from flux_nf4.nf4.search import quantize_searched
from flux_nf4.pipeline.convert import QuantizationWish, is_linear_weight, quantize_component
from flux_nf4.pipeline.decode import decode_latents
from flux_nf4.pipeline.load import LoadSettings, Model, assemble_model, demo_path
from flux_nf4.pipeline.sampling import draw_noise, euler_step, make_schedule, pack, token_grid
from training.compose import Composer, load_sprites
from training.measures import Measures, summary
from training.prompts import load_prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from flux_nf4.formats.checkpoint import Checkpoint
    from flux_nf4.formats.component import Component, Entry

ROOT = Path(__file__).parents[1]
BF16_WEIGHTS = ROOT / "training" / "weights" / "flux-demo-bf16.safetensors"
RESULTS = Path(__file__).parent / "results"
SIDE = 256
NUM_STEPS = 20
GUIDANCE = 3.5
FIRST_SEED = 1000
SIX_PROMPTS = (
    "a cat on a lavender background",
    "an owl above a mushroom on a beige background",
    "three strawberries on a white background",
    "an astronaut to the left of a rocket on a dark blue background",
    "a purple tiger on a yellow background",
    "a robot on a light green background",
)


def to_fp8(component: Component) -> Component:
    """Every Linear weight in e4m3 without scales: the fp8 storage that other tools offer."""

    def store(name: str, entry: Entry) -> Entry:
        if isinstance(entry, NF4Weight) or not is_linear_weight(name, entry):
            return entry
        return entry.to(torch.float8_e4m3fn)

    entries = {name: store(name, entry) for name, entry in component.entries.items()}
    return dataclasses.replace(component, entries=entries)


def to_four_bits(quant_type: str, *, nested: bool) -> Callable[[Component], Component]:
    """Every Linear weight in four bits, by the package's own quantiser."""
    wish = QuantizationWish(quant_type=quant_type, double_quant=nested)  # type: ignore[arg-type]
    return lambda component: quantize_component(component, wish)


def to_searched(component: Component) -> Component:
    """Every Linear weight in NF4 v2, its scales searched for: `quantize --scale search`."""
    entries = {
        name: quantize_searched(entry)
        if is_linear_weight(name, entry) and not isinstance(entry, NF4Weight)
        else entry
        for name, entry in component.entries.items()
    }
    return dataclasses.replace(component, entries=entries)


FORMATS: dict[str, Callable[[Component], Component] | None] = {
    "bf16": lambda component: component,
    "fp8": to_fp8,
    "nf4-v1": to_four_bits("nf4", nested=True),
    "nf4-v2": to_four_bits("nf4", nested=False),
    "nf4-v2-search": to_searched,
    "fp4": to_four_bits("fp4", nested=False),
    "shipped": None,
}


def checkpoint_in(name: str) -> Checkpoint:
    """The model in one of `FORMATS`."""
    change = FORMATS[name]
    if change is None:
        return open_checkpoint(demo_path())
    checkpoint = open_checkpoint(BF16_WEIGHTS)
    components = dict(checkpoint.components)
    components["transformer"] = change(components["transformer"])
    return dataclasses.replace(checkpoint, components=components)


def transformer_bytes(component: Component) -> int:
    """Bytes of a transformer's weights as they are stored."""
    return sum(
        entry.num_bytes if isinstance(entry, NF4Weight) else entry.nbytes
        for entry in component.entries.values()
    )


@torch.inference_mode()
def draw(model: Model, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """One picture a prompt, as a batch: float32 [n, 3, 256, 256] in [0, 1], on the CPU."""
    device, facts = model.device, model.facts
    ids, _ = model.tokenizers.encode_t5(list(prompts), facts.max_sequence_length)
    txt = model.t5(ids.to(device)).to(model.dtype)
    pooled = model.clip(model.tokenizers.encode_clip(list(prompts)).to(device)).to(model.dtype)
    rows, columns = token_grid(SIDE, SIDE)
    sigmas = make_schedule(NUM_STEPS, rows * columns, facts)
    guidance = torch.full((len(prompts),), GUIDANCE, device=device)
    table = model.transformer.conditioner.table(sigmas[:-1].to(device), guidance, pooled)
    rope = rope_table(txt.shape[1], rows, columns, model.transformer.config, device)
    x = pack(draw_noise(seeds, SIDE, SIDE)).to(device)
    for step, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas.tolist())):
        velocity = model.transformer.blocks(x.to(model.dtype), txt, table[step], rope)
        x = euler_step(x, velocity, sigma, next_sigma)
    return decode_latents(model, x, SIDE, SIDE).cpu()


def draw_all(model: Model, prompts: Sequence[str], batch_size: int, label: str) -> Tensor:
    """Pictures of every prompt, 8-bit as a file would hold them: uint8 [n, 3, 256, 256]."""
    start, parts = time.monotonic(), []
    for first in range(0, len(prompts), batch_size):
        part = prompts[first : first + batch_size]
        seeds = range(FIRST_SEED + first, FIRST_SEED + first + len(part))
        parts.append((draw(model, part, seeds) * 255).round().to(torch.uint8))
        done = first + len(part)
        left = (time.monotonic() - start) * (len(prompts) / done - 1)
        print(f"\r{label}: {done} of {len(prompts)}, {left:.0f} s left   ", end="", flush=True)
    print(f"\r{label}: {len(prompts)} pictures in {time.monotonic() - start:.0f} s      ")
    return torch.cat(parts)


def psnr(images: Tensor, others: Tensor) -> list[float]:
    """Decibels between 8-bit pictures, one a pair."""
    error = (images.float() - others.float()).div(255).pow(2).mean(dim=(1, 2, 3)).clamp(min=1e-9)
    return (-10 * torch.log10(error)).tolist()


def score(measures: Measures, images: Tensor, specs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The summary of `training.measures` for 8-bit pictures."""
    results = []
    for first in range(0, len(specs), 64):
        part = images[first : first + 64].to(measures.device).float() / 127.5 - 1
        results += measures(part, specs[first : first + 64])
    return dict(summary(specs, results))


def machine(device: torch.device) -> dict[str, str]:
    """Where and with what this ran."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": name or platform.machine(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw and judge every format that was asked for."""
    settings = LoadSettings(device=arguments.device, dtype=torch.bfloat16)
    prompts = load_prompts()
    specs = (prompts["test"] + prompts["unknown"])[:: arguments.every]
    captions = [spec["caption"] for spec in specs]
    rows: dict[str, dict[str, Any]] = {}
    reference: Tensor | None = None
    measures: Measures | None = None
    for name in arguments.formats:
        checkpoint = checkpoint_in(name)
        model = assemble_model(checkpoint, settings, is_managed=False)
        measures = measures or Measures(Composer(load_sprites(), model.device))
        images = draw_all(model, captions, arguments.batch_size, name)
        reference = images if name == "bf16" else reference
        row = score(measures, images, specs)
        row["bytes"] = transformer_bytes(checkpoint.components["transformer"])
        if reference is not None and name != "bf16":
            values = torch.tensor(psnr(images, reference))
            row["psnr_to_bf16"] = round(float(values.median()), 2)
        rows[name] = row
        print(f"{name}: {row}")
        six = draw(model, SIX_PROMPTS, range(len(SIX_PROMPTS)))
        rows[name]["pictures"] = (six * 255).round().to(torch.uint8)
    return {
        "machine": machine(model.device),
        "num_prompts": len(specs),
        "ceiling": prompts["ceiling"],
        "formats": rows,
    }


def main() -> None:
    """Parse, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--every", type=int, default=1, help="every n-th prompt only, for a look")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    results = evaluate(arguments)
    write_report(results, arguments.out)
    print(json.dumps({name: row["psnr_one"] for name, row in results["formats"].items()}))


if __name__ == "__main__":
    main()
