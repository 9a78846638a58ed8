"""Which arithmetic a device can multiply in, and which layers take it.

| arithmetic | needs                            | products of           |
|------------|----------------------------------|-----------------------|
| `bf16`     | any device                       | the model's own dtype |
| `fp8`      | compute capability 8.9, or a CPU | e4m3, summed as float |
| `int8`     | compute capability 8.0, or a CPU | int8, summed as int32 |

A CPU has both for comparisons and tests: they are emulated, and slower than `bf16`.

The two differ in more than speed: e4m3 has three bits after the point, so `int8`, rotated, is three
times nearer to the exact result (1.3 % against 4.3 % of the velocity on the demo model, median of
69 forwards), and images of the same seed are 10 dB closer. `auto` takes `fp8` where it is clearly
quicker, which was measured on Hopper (85 against 99 ms a step, of a prototype), and `int8` on
other cards: GeForce ones, by NVIDIA's figures, multiply integers at twice the rate of 8-bit floats
that are summed in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch

from flux_nf4.errors import InputError
from flux_nf4.nf4.eight_bit import Arithmetic
from flux_nf4.nf4.linear import NF4Linear

if TYPE_CHECKING:
    from flux_nf4.model.blocks import FluxBlocks

ArithmeticWish = Literal["auto", "bf16", "fp8", "int8"]

# The first and the last layers: 0.15 % of the work. On the demo model the last one alone, in fp8,
# moves the velocity by 2.9 %, as much as all `linear1` or all `linear2` together (3.1, 3.0); every
# other kind stays below 1.9 %. The conditioner's layers have no part in this: they run once.
KEEPS_BF16 = ("img_in", "txt_in", "final_layer.linear")

# Data-centre Hopper and Blackwell.
_FP8_GENERATIONS = (9, 10)
_LEAST_CAPABILITY: dict[Arithmetic, tuple[int, int]] = {"fp8": (8, 9), "int8": (8, 0)}


def check_arithmetic(wish: str) -> None:
    """Raises InputError unless `wish` is a name that this package knows."""
    if wish not in get_args(ArithmeticWish):
        names = ", ".join(f"`{name}`" for name in get_args(ArithmeticWish))
        raise InputError(f"`{wish}` is not an arithmetic", hint=f"use one of {names}")


def possible_arithmetic(device: torch.device) -> tuple[Arithmetic, ...]:
    """What the device can multiply in."""
    if device.type == "cpu":
        return "bf16", "fp8", "int8"
    if device.type != "cuda":
        return ("bf16",)
    capability = torch.cuda.get_device_capability(device)
    fits = [name for name, least in _LEAST_CAPABILITY.items() if capability >= least]
    return "bf16", *fits


def _automatic(device: torch.device) -> tuple[Arithmetic, str]:
    """What `auto` takes, and why."""
    possible = possible_arithmetic(device)
    if device.type != "cuda" or "int8" not in possible:
        return "bf16", "exact, and the fastest that this device has"
    major, _ = torch.cuda.get_device_capability(device)
    if major in _FP8_GENERATIONS:
        return "fp8", "the fastest on this device; `bf16` is the exact one"
    return "int8", "quicker than `bf16`, the exact one, and nearer to it than `fp8`"


def choose_arithmetic(wish: ArithmeticWish, device: torch.device) -> tuple[Arithmetic, str | None]:
    """The arithmetic for a wish, and for `auto` a sentence that says which and why.

    Raises:
        InputError: the device does not have it.
    """
    check_arithmetic(wish)
    if wish == "auto":
        chosen, why = _automatic(device)
        return chosen, f"arithmetic `{chosen}`: {why}"
    possible = possible_arithmetic(device)
    if wish not in possible:
        names = ", ".join(f"`{name}`" for name in possible)
        raise InputError(f"`{device}` cannot multiply in `{wish}`", hint=f"it can in {names}")
    return wish, None


def set_arithmetic(blocks: FluxBlocks, arithmetic: Arithmetic) -> None:
    """Let the blocks' NF4 layers multiply so.

    Layers of `KEEPS_BF16`, layers that are not NF4, and those whose size does not fit stay exact.
    """
    for name, layer in blocks.named_modules():
        if isinstance(layer, NF4Linear):
            fits = name not in KEEPS_BF16 and layer.fits_eight_bit
            layer.set_arithmetic(arithmetic if fits else "bf16")
