"""How fast NF4 quantisation is on two cores, side by side with bitsandbytes.

    python -m benchmarks.quantize

Both quantise the same layer of FLUX.1-dev from memory to memory, in turns, so that what else the
machine does falls on both; every code and scale is compared first. The best and the median of the
turns are kept: with other programs running, the best is the nearer to what a core can do. Beside
them stands what copying the bytes alone would take, the ceiling of any quantiser.

Writes `benchmarks/results/quantize.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.functional import quantize_4bit

from flux_nf4.cli.bench_record import environment
from flux_nf4.pipeline.quantizer import ParallelQuantizer, QuantizationSettings, one_thread_each

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

RESULT = Path(__file__).parent / "results" / "quantize.json"
LAYERS = {"img_attn.proj": (3072, 3072), "linear2": (3072, 15360), "linear1": (21504, 3072)}
NUM_TURNS = 11
NUM_CORES = 2


def turns(ways: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each way, in turns, after one turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(NUM_TURNS + 1):
        for name, way in ways.items():
            started_s = time.perf_counter()
            way()
            if turn:
                times[name].append(time.perf_counter() - started_s)
    return times


def copy_of(w_NK: Tensor) -> Callable[[], object]:
    """Reads what a quantiser reads, and writes as much as it writes."""
    out = torch.empty(w_NK.numel() * 9 // 16, dtype=torch.uint8)
    source = w_NK.view(torch.uint8).flatten()

    def copy() -> object:
        source.sum(dtype=torch.uint8)
        return out.fill_(1)

    return copy


def measure(quantizer: ParallelQuantizer, w_NK: Tensor) -> dict[str, Any]:
    """Million values a second of both, and of the copy."""
    theirs, state = quantize_4bit(w_NK, blocksize=64, quant_type="nf4")
    ours = quantizer.quantize("w", w_NK)
    assert torch.equal(ours.codes, theirs.view(-1))
    assert torch.equal(ours.float_absmax(), state.absmax)
    times = turns(
        {
            "flux_nf4": lambda: quantizer.quantize("w", w_NK),
            "bitsandbytes": lambda: quantize_4bit(w_NK, blocksize=64, quant_type="nf4"),
            "copy": copy_of(w_NK),
        }
    )
    million = w_NK.numel() / 1e6
    best = {name: million / min(each) for name, each in times.items()}
    median = {name: million / statistics.median(each) for name, each in times.items()}
    return {
        "best_mvalues_s": {name: round(each, 1) for name, each in best.items()},
        "median_mvalues_s": {name: round(each, 1) for name, each in median.items()},
        "best_ratio": round(best["flux_nf4"] / best["bitsandbytes"], 2),
        "median_ratio": round(median["flux_nf4"] / median["bitsandbytes"], 2),
    }


def machine() -> dict[str, Any]:
    """Where and of what this was measured."""
    found = environment("cpu")
    return {
        "processor": found["device"]["name"],
        "num_cores": NUM_CORES,
        "torch": found["versions"]["torch"],
        "bitsandbytes": found["versions"]["bitsandbytes"],
        "commit": found["commit"],
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    """Measure every layer in bf16 and float32, and write the result."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])
    torch.set_num_threads(NUM_CORES)
    layers: dict[str, Any] = {}
    with one_thread_each() as pool:
        quantizer = ParallelQuantizer(QuantizationSettings(device="cpu"), pool)
        for name, shape in LAYERS.items():
            for dtype in (torch.bfloat16, torch.float32):
                torch.manual_seed(0)
                w_NK = torch.randn(shape).to(dtype)
                layers[f"{name} {str(dtype).removeprefix('torch.')}"] = measure(quantizer, w_NK)
    RESULT.write_text(json.dumps({"machine": machine(), "layers": layers}, indent=1) + "\n")


if __name__ == "__main__":
    main()
