"""What a device can do at best: its own matrix products, attention and copies, at a model's shapes.

A few seconds on a GPU. On a CPU the products have fewer rows and are scaled up, for the same
reason. Memory-bound work between the products is not counted, so no step reaches its ceiling.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_nf4.model.attention import attend
from flux_nf4.nf4 import eight_bit, ops
from flux_nf4.pipeline.sampling import token_grid

if TYPE_CHECKING:
    from collections.abc import Callable

    from flux_nf4.model.blocks import FluxBlocks
    from flux_nf4.nf4.eight_bit import Arithmetic

_BUDGET_S = 0.1  # for each thing that is measured
_LEAST_SAMPLES = 3
_SAMPLE_S = 0.01  # so that waiting for the device is nothing beside the calls
_MOST_CALLS = 100
_CPU_ROWS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Seconds that the products and the attention of one step take at best, and their rates.

    Rates are in operations a second; `copy_bytes_per_s` counts bytes read and bytes written.
    """

    products_s: float
    products_per_s: float
    attention_s: float
    attention_per_s: float
    copy_bytes_per_s: float

    @property
    def step_s(self) -> float:
        """Products and attention together: a step cannot be shorter."""
        return self.products_s + self.attention_s


def timed_calls(
    call: Callable[[], object], device: torch.device, budget_s: float = _BUDGET_S
) -> list[float]:
    """Seconds of a call, three times at least; short calls are timed many at a time.

    One call before is not counted.
    """
    _seconds(call, 1, device)
    num_calls = max(1, min(_MOST_CALLS, int(_SAMPLE_S / _seconds(call, 1, device))))
    seconds: list[float] = []
    while len(seconds) < _LEAST_SAMPLES or sum(seconds) * num_calls < budget_s:
        seconds.append(_seconds(call, num_calls, device) / num_calls)
    return seconds


def _seconds(call: Callable[[], object], num_calls: int, device: torch.device) -> float:
    synchronize(device)
    began_s = time.perf_counter()
    for _ in range(num_calls):
        call()
    synchronize(device)
    return time.perf_counter() - began_s


def synchronize(device: torch.device) -> None:
    """Return when the device has done what it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def measure_ceilings(
    blocks: FluxBlocks,
    *,
    size: tuple[int, int],
    num_text_tokens: int,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    arithmetic: Arithmetic,
) -> Ceilings:
    """Time each shape of product once, attention, and a copy; `size` is in pixels."""
    rows, columns = token_grid(*size)
    num_tokens = {"txt": num_text_tokens, "img": rows * columns}
    counts: dict[tuple[int, int, int], int] = {}
    for name, layer in blocks.named_modules():
        if hasattr(layer, "in_features"):
            shape = (_num_rows(name, num_tokens) * batch_size, *_features(layer))
            counts[shape] = counts.get(shape, 0) + 1
    # A CPU's 8-bit products are emulated: what it can do is its own dtype.
    arithmetic = arithmetic if device.type == "cuda" else "bf16"
    products_s = sum(
        count * _product_s(shape, device, dtype, arithmetic) for shape, count in counts.items()
    )
    operations = sum(2 * count * m * n * k for (m, n, k), count in counts.items())

    config, total = blocks.config, sum(num_tokens.values())
    heads = (batch_size, total, config.num_heads, config.head_dim)
    num_blocks = config.num_double_blocks + config.num_single_blocks
    attention_s = num_blocks * _attention_s(heads, device, dtype)
    attention = 4 * num_blocks * batch_size * total**2 * config.hidden_size
    return Ceilings(
        products_s=products_s,
        products_per_s=operations / products_s,
        attention_s=attention_s,
        attention_per_s=attention / attention_s,
        copy_bytes_per_s=_copy_bytes_per_s(device),
    )


def _num_rows(name: str, num_tokens: dict[str, int]) -> int:
    if name.startswith("single_blocks"):
        return sum(num_tokens.values())
    return num_tokens["txt" if "txt_" in name else "img"]


def _features(layer: torch.nn.Module) -> tuple[int, int]:
    num_out, num_in = layer.out_features, layer.in_features
    assert isinstance(num_out, int)
    assert isinstance(num_in, int)
    return num_out, num_in


def _product_s(
    shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, arithmetic: Arithmetic
) -> float:
    num_rows, num_out, num_in = shape
    measured = num_rows if device.type == "cuda" else min(num_rows, _CPU_ROWS)
    x = torch.randn(measured, num_in, device=device, dtype=dtype)
    w = torch.randn(num_out, num_in, device=device, dtype=dtype)
    if arithmetic == "bf16" or num_out % 16 or num_in % eight_bit.ROTATION:

        def multiply() -> Tensor:
            return F.linear(x, w)
    else:
        quantized = eight_bit.quantize_rows(x, arithmetic)
        weight = eight_bit.quantize_rows(w, arithmetic)
        scale_N = weight.scale.flatten()

        def multiply() -> Tensor:
            return ops.multiply(quantized, weight.values, scale_N, None, dtype)

    return median(timed_calls(multiply, device)) * num_rows / measured


def _attention_s(
    heads: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
) -> float:
    batch, total, num_heads, head_dim = heads
    measured = total if device.type == "cuda" else min(total, _CPU_ROWS)
    shape = (batch, measured, num_heads, head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    seconds = median(timed_calls(lambda: attend(q, k, v), device))
    return seconds * (total / measured) ** 2


def _copy_bytes_per_s(device: torch.device) -> float:
    num_bytes = 1 << (30 if device.type == "cuda" else 26)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / median(timed_calls(lambda: target.copy_(source), device))
