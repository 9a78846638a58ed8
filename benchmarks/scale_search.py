"""What choosing block scales by squared error gains, what it costs, how near it is to the best.

    python -m benchmarks.scale_search

Every way is measured on Gaussian weights and on the demo model's own (bf16, before training knew
of NF4), in blocks of 64: relative RMSE, and processor time of one thread. `least` is the least
error there is, by walking through every change of a code as the scale falls: exact and slow.
Also measured: the memory that searching a layer of 21504 x 3072 needs beyond the layer itself.

Writes `benchmarks/results/scale_search.json`, which `docs/make_nf4_figures.py` draws.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flux_nf4.cli.machine import processor_name
from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.nf4 import reference
from flux_nf4.nf4.codec import NF4Weight, levels
from flux_nf4.nf4.search import quantize_searched
from flux_nf4.pipeline.convert import is_linear_weight

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

ROOT = Path(__file__).parents[1]
DEMO_WEIGHTS = ROOT / "training" / "weights" / "flux-demo-bf16.safetensors"
RESULT = Path(__file__).parent / "results" / "scale_search.json"
BLOCK_SIZE = 64
LARGEST_LAYER = (21504, 3072)


def least_errors(w_NK: Tensor, block_size: int, *, signed: bool) -> Tensor:
    """The least squared error there is, block by block: (G,) float64.

    As the scale falls from infinity, codes change one at a time; every set of codes on the way is
    tried, with its own best scale.
    """
    level = levels("nf4").double()
    thresholds = (level[:-1] + level[1:]) / 2
    best_G = torch.zeros(w_NK.numel() // block_size, dtype=torch.float64)
    for sign in (1, -1) if signed else (1,):
        w_GS1 = sign * w_NK.double().reshape(-1, block_size, 1)
        when = thresholds / w_GS1
        is_crossed = when > 0
        order = when.where(is_crossed, torch.inf).flatten(1).argsort(dim=1)
        step = (level[1:] - level[:-1]) * w_GS1.abs() * is_crossed
        growth = (level[1:].square() - level[:-1].square()) * w_GS1.sign() * is_crossed
        dot = step.flatten(1).gather(1, order).cumsum(1)
        square = growth.flatten(1).gather(1, order).cumsum(1)
        gain = (dot.square() / square).where(square > 1e-9, 0)
        best_G = best_G.maximum(gain.amax(dim=1))
    return w_NK.double().square().reshape(-1, block_size).sum(dim=1) - best_G


def alternated(w_NK: Tensor, num_rounds: int) -> NF4Weight:
    """From absmax: the best scale of these codes, the codes nearest under it, and so on."""
    weight = reference.quantize(w_NK)
    w_GS = w_NK.float().view(-1, BLOCK_SIZE)
    for _ in range(num_rounds):
        ones = dataclasses.replace(weight, absmax=torch.ones_like(weight.float_absmax()))
        levels_GS = reference.dequantize(ones, torch.float32).view(-1, BLOCK_SIZE)
        scale_G = (w_GS * levels_GS).sum(dim=1) / levels_GS.square().sum(dim=1)
        weight = dataclasses.replace(weight, absmax=scale_G)
        if num_rounds > 1:
            scaled_V = (w_GS / scale_G[:, None]).clamp_(-1, 1).view(-1)
            codes_V = reference.nearest_codes(scaled_V, "nf4")
            weight = dataclasses.replace(weight, codes=codes_V[0::2] << 4 | codes_V[1::2])
    return weight


def nested(weight: NF4Weight) -> NF4Weight:
    """The same with its scales quantised too."""
    return dataclasses.replace(weight, absmax=reference.nest_absmax(weight.float_absmax()))


WAYS: dict[str, Callable[[Tensor], NF4Weight]] = {
    "absmax (v2)": reference.quantize,
    "absmax, nested (v1)": lambda w_NK: nested(reference.quantize(w_NK)),
    "absmax's codes, their best scale": lambda w_NK: alternated(w_NK, 1),
    "codes and scale by turns, 10 times": lambda w_NK: alternated(w_NK, 10),
    "search, positive, nested (v1)": lambda w_NK: nested(quantize_searched(w_NK, signed=False)),
    "search, positive (v2)": lambda w_NK: quantize_searched(w_NK, signed=False),
    "search (v2)": quantize_searched,
}


def relative_rmse(w_NK: Tensor, weight: NF4Weight) -> float:
    """The norm of the error over that of the weight, in float64: float32 loses its fourth digit."""
    error = reference.dequantize(weight, torch.float32).double() - w_NK
    return float(error.norm() / w_NK.double().norm())


def demo_weights() -> list[Tensor]:
    """Every Linear weight of the demo model's transformer, in bf16."""
    entries = open_checkpoint(DEMO_WEIGHTS).components["transformer"].entries
    return [
        entry
        for name, entry in entries.items()
        if is_linear_weight(name, entry) and not isinstance(entry, NF4Weight)
    ]


def measure(w_NK: Tensor) -> dict[str, dict[str, float]]:
    """Error and time of every way, and the least error there is."""
    rows: dict[str, dict[str, float]] = {}
    for name, way in WAYS.items():
        times_s = []
        for _ in range(3):
            start = time.process_time()
            weight = way(w_NK)
            times_s.append(time.process_time() - start)
        error = relative_rmse(w_NK, weight)
        rows[name] = {"relative_rmse": error, "ns_per_weight": min(times_s) / w_NK.numel() * 1e9}
    for name, signed in (("least, positive", False), ("least", True)):
        start = time.process_time()
        error = sum(
            float(least_errors(rows_MK, BLOCK_SIZE, signed=signed).sum())
            for rows_MK in w_NK.split(16)
        )
        time_s = time.process_time() - start
        rows[name] = {
            "relative_rmse": (error / float(w_NK.double().square().sum())) ** 0.5,
            "ns_per_weight": time_s / w_NK.numel() * 1e9,
        }
    for name, row in rows.items():
        print(f"  {name:<36}{row['relative_rmse']:.5f}{row['ns_per_weight']:10.1f} ns a weight")
    return rows


def memory_of_largest_layer() -> dict[str, float]:
    """Bytes that the search needs at most beyond weight and result, and its time."""
    w_NK = torch.empty(LARGEST_LAYER, dtype=torch.bfloat16).normal_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    weight = quantize_searched(w_NK)
    time_s = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(
        f"21504 x 3072: {time_s:.2f} s, {(grown - weight.num_bytes) / 1e6:.0f} MB beyond the result"
    )
    return {"time_s": time_s, "result_bytes": weight.num_bytes, "grown_bytes": grown}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT, help="the JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "machine": f"{processor_name()}, one thread, torch {torch.__version__}",
        "largest_layer": memory_of_largest_layer(),
    }
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(4096, 4096, generator=generator)
    values = torch.cat([each.flatten().float() for each in demo_weights()])
    demo = values[: len(values) // 4096 * 4096].view(-1, 4096)
    for name, w_NK in (("gaussian", gaussian), ("demo", demo)):
        print(f"{name}, {w_NK.numel() / 1e6:.1f} M weights")
        results[name] = measure(w_NK)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
