"""Time every kernel at FLUX.1's sizes, once for each value of its tuning constants, on one GPU.

    python -m benchmarks.kernels [expand] [int8] [norm] [rotate] [join] [attention]

Prints a JSON line a measurement, with the share of the device's own copy bandwidth where bytes are
the limit, and at the end the best values. The constants stand at the head of
`nf4/triton_kernels.py`, `nf4/triton_int8.py`, `model/fused_kernels.py` and `model/attention.py`;
change them there.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel
from triton.testing import do_bench

from flux_nf4.model import attention, fused_kernels
from flux_nf4.model.arithmetic import possible_arithmetic
from flux_nf4.nf4 import eight_bit, triton_int8, triton_kernels

DEVICE = torch.device("cuda")
TOKENS, HEADS, CHANNELS = 4608, 24, 128
HIDDEN, INNER = HEADS * CHANNELS, 4 * HEADS * CHANNELS
# (out, in) of a single block's two layers and of a double block's four.
LAYERS = [
    (3 * HIDDEN + INNER, HIDDEN),
    (HIDDEN, HIDDEN + INNER),
    (3 * HIDDEN, HIDDEN),
    (HIDDEN, HIDDEN),
    (INNER, HIDDEN),
    (HIDDEN, INNER),
]
INT8_TILES = [
    (128, 256, 128, 8, 3), (128, 256, 64, 8, 4), (256, 128, 128, 8, 3), (128, 128, 128, 8, 4),
    (128, 128, 128, 4, 3), (128, 128, 64, 4, 4), (128, 128, 64, 4, 5), (64, 256, 64, 4, 4),
]  # fmt: skip

Point = dict[str, Any]


def milliseconds(call: Callable[..., object], *given: Any) -> float:
    """Median of `call(*given)`, with a cold second-level cache."""
    return do_bench(lambda: call(*given), warmup=20, rep=80, return_mode="median")


def random(*shape: int) -> torch.Tensor:
    """Normal values in bfloat16."""
    return torch.randn(*shape, device=DEVICE).bfloat16()


@contextmanager
def constants(module: ModuleType, **values: object) -> Iterator[None]:
    """Other tuning constants for a while."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 512 MiB."""
    source = torch.empty(2**29, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(target.copy_, source) * 1e3


def expand(kinds: list[eight_bit.Arithmetic]) -> Iterator[Point]:
    """NF4 to each type, with float32 and nested absmax."""
    for (num_out, num_in), kind, nested in itertools.product(LAYERS[:2], kinds, (False, True)):
        codes_P = torch.randint(256, (num_out * num_in // 2,), dtype=torch.uint8, device=DEVICE)
        num_blocks = num_out * num_in // 64
        absmax = [torch.rand(num_blocks, device=DEVICE)]
        if nested:
            absmax = [
                torch.randint(256, (num_blocks,), dtype=torch.uint8, device=DEVICE),
                torch.rand(-(-num_blocks // 256), device=DEVICE),
                torch.rand(256, device=DEVICE),
                torch.rand((), device=DEVICE),
            ]
        dtype = torch.bfloat16 if kind == "bf16" else eight_bit.eight_bit_dtype(kind)
        inverse_N = None if kind == "bf16" else torch.ones(num_out, device=DEVICE)
        out_NK = torch.empty(num_out, num_in, dtype=dtype, device=DEVICE)
        num_bytes = codes_P.nbytes + sum(each.nbytes for each in absmax) + out_NK.nbytes
        operands = (out_NK, codes_P, absmax, 256, inverse_N, 64, "nf4")
        for values, warps in itertools.product((2048, 4096, 8192, 16384, 32768), (2, 4, 8)):
            given = {"INT8_PROGRAM" if kind == "int8" else "PROGRAM": (values, warps)}
            with constants(triton_kernels, **given):
                spent = milliseconds(triton_kernels.expand_into, *operands)
            case = {"kernel": "expand", "to": kind, "nested": nested, "shape": [num_out, num_in]}
            yield case | given | {"ms": spent, "bytes": num_bytes}


def int8(_: list[eight_bit.Arithmetic]) -> Iterator[Point]:
    """The int8 product of every layer, and PyTorch's own for comparison."""
    for num_out, num_in in LAYERS:
        x_MK, w_NK = (
            torch.randint(-127, 128, (rows, num_in), dtype=torch.int8, device=DEVICE)
            for rows in (TOKENS, num_out)
        )
        scale, bias = torch.rand(TOKENS + num_out, device=DEVICE), random(num_out)
        operands = (x_MK, scale[:TOKENS, None], w_NK, scale[TOKENS:], bias, torch.bfloat16)
        case = {"kernel": "int8", "shape": [TOKENS, num_out, num_in]}
        flops = 2 * TOKENS * num_out * num_in
        own = milliseconds(torch._int_mm, x_MK, w_NK.t())
        yield case | {"tiles": "torch._int_mm", "ms": own, "flops": flops}
        for tiles, group in itertools.product(INT8_TILES, (4, 8, 16)):
            triton_int8._int8_tiles.cache_clear()
            given = {"INT8_TILES": {(8, 0): tiles}, "INT8_GROUP": group}
            with constants(triton_int8, **given):
                try:
                    spent = milliseconds(triton_int8.multiply_int8, *operands)
                except triton_int8.triton.runtime.errors.OutOfResources:
                    continue
            yield case | {"tiles": [*tiles, group], "ms": spent, "flops": flops}
    triton_int8._int8_tiles.cache_clear()


def norm(kinds: list[eight_bit.Arithmetic]) -> Iterator[Point]:
    """Gated residual, norm, modulation, quantisation."""
    x, y, row = random(1, TOKENS, HIDDEN), random(1, TOKENS, HIDDEN), random(1, 3 * HIDDEN)
    shift, scale, gate = row.chunk(3, -1)
    for kind, warps in itertools.product(kinds, (2, 4, 8, 16)):
        with constants(fused_kernels, NORM_WARPS=warps):
            spent = milliseconds(fused_kernels.norm_modulate, x, shift, scale, kind, (y, gate))
        num_bytes = 3 * x.nbytes + x.nbytes // (1 if kind == "bf16" else 2)
        yield {"kernel": "norm", "to": kind, "warps": warps, "ms": spent, "bytes": num_bytes}


def rotate(_: list[eight_bit.Arithmetic]) -> Iterator[Point]:
    """QK norm and rotation, with and without values."""
    qkv, rope = random(1, TOKENS, 3 * HIDDEN + INNER), random(2, TOKENS, CHANNELS // 2).float()
    weight = torch.ones(CHANNELS, device=DEVICE)
    q, k, v = (random(1, TOKENS, HEADS, CHANNELS) for _ in range(3))
    for with_v, warps in itertools.product((False, True), (2, 4, 8)):
        with constants(fused_kernels, ROTATE_WARPS=warps):
            heads = (q, k, v if with_v else None)
            spent = milliseconds(
                fused_kernels.norm_rotate_out, qkv[..., : 3 * HIDDEN], weight, weight, rope, heads
            )
        case = {"kernel": "rotate", "values": with_v, "warps": warps}
        yield case | {"ms": spent, "bytes": (6 if with_v else 4) * q.nbytes}


def join(kinds: list[eight_bit.Arithmetic]) -> Iterator[Point]:
    """GELU beside attention's output, and alone, quantised."""
    attended = random(1, TOKENS, HEADS, CHANNELS)
    inner = random(1, TOKENS, 3 * HIDDEN + INNER)[..., 3 * HIDDEN :]
    parts = {"both": (attended, inner), "gelu": (None, inner), "attention": (attended, None)}
    warps = (512, 1024, 2048, 4096)
    for kind, (name, given), values in itertools.product(kinds, parts.items(), warps):
        with constants(fused_kernels, VALUES_PER_JOIN_WARP={kind: values}, MAX_WARPS=32):
            spent = milliseconds(fused_kernels.join, *given, kind, torch.bfloat16)
        num_values = sum(each.numel() for each in given if each is not None)
        case = {"kernel": "join", "to": kind, "parts": name, "values_per_warp": values}
        yield case | {"ms": spent, "bytes": num_values * (4 if kind == "bf16" else 3)}


def attend(_: list[eight_bit.Arithmetic]) -> Iterator[Point]:
    """Every back end, with heads in both orders; values within a product, or in that order, too."""
    product = random(1, TOKENS, 3 * HIDDEN + INNER)
    within = product[..., : 3 * HIDDEN].unflatten(-1, (3, HEADS, CHANNELS))[:, :, 2]
    for backend, first, is_apart in itertools.product(
        attention.BACKENDS, (False, True), (False, True)
    ):
        with sdpa_kernel(backend):
            sizes = (HEADS, TOKENS) if first else (TOKENS, HEADS)
            q, k, v = (random(1, *sizes, CHANNELS) for _ in range(3))
            if not first:
                q, k, v = (each.transpose(1, 2) for each in (q, k, v))
            heads = q, k, v if is_apart else within.transpose(1, 2)
            try:
                spent = milliseconds(torch.nn.functional.scaled_dot_product_attention, *heads)
            except RuntimeError:
                continue
        case = {"kernel": "attention", "backend": backend.name, "heads_first": first}
        yield case | {"values_apart": is_apart, "ms": spent, "flops": 4 * TOKENS**2 * HIDDEN}


SWEEPS: dict[str, Callable[[list[eight_bit.Arithmetic]], Iterator[Point]]] = {
    "expand": expand,
    "int8": int8,
    "norm": norm,
    "rotate": rotate,
    "join": join,
    "attention": attend,
}
# What tells cases apart; everything else in a point is a choice or a result.
CASE = ("kernel", "to", "nested", "shape", "values", "parts")


def main() -> None:
    """Run the sweeps that are named, all of them without a name."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="KERNEL", help=", ".join(SWEEPS))
    names = parser.parse_args().names
    if unknown := set(names) - set(SWEEPS):
        parser.error(f"no such kernel: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to measure")
    bandwidth = copy_bandwidth()
    print(json.dumps({"device": torch.cuda.get_device_name(), "copy GB/s": bandwidth / 1e9}))
    best: dict[str, Point] = {}
    for name in names or SWEEPS:
        for point in SWEEPS[name](list(possible_arithmetic(DEVICE))):
            if "bytes" in point:
                share = point.pop("bytes") / point["ms"] * 1e3 / bandwidth
                point["share of copy"] = round(share, 3)
            else:
                point["TFLOP/s"] = round(point.pop("flops") / point["ms"] / 1e9, 1)
            print(json.dumps(point), flush=True)
            case = json.dumps([point.get(key) for key in CASE])
            if case not in best or point["ms"] < best[case]["ms"]:
                best[case] = point
    for point in best.values():
        print(json.dumps({"best": point}))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
