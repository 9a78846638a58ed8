"""Which arithmetic a device can multiply in, and which layers take it.

| arithmetic | needs                            | products of           |
|------------|----------------------------------|-----------------------|
| `bf16`     | any device                       | the model's own dtype |
| `fp8`      | compute capability 8.9, or a CPU | e4m3, summed as float |
| `int8`     | compute capability 8.0, or a CPU | int8, summed as int32 |

A CPU has both for comparisons and tests: they are emulated, and slower than `bf16`.
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

# First and last layers: a hundredth of the work, with all that the image is made of passing
# through few channels. The modulation layers are the conditioner's, which has no part in this.
KEEPS_BF16 = ("img_in", "txt_in", "final_layer.linear")

_LEAST_CAPABILITY: dict[Arithmetic, tuple[int, int]] = {"fp8": (8, 9), "int8": (8, 0)}


def check_arithmetic(wish: str) -> None:
    """Raises InputError unless `wish` is a name that this package knows."""
    if wish not in get_args(ArithmeticWish):
        names = ", ".join(f"`{name}`" for name in get_args(ArithmeticWish))
        raise InputError(f"`{wish}` is not an arithmetic", hint=f"use one of {names}")


def possible_arithmetic(device: torch.device) -> tuple[Arithmetic, ...]:
    """What the device can multiply in, the fastest first."""
    if device.type == "cpu":
        return "bf16", "fp8", "int8"
    if device.type != "cuda":
        return ("bf16",)
    capability = torch.cuda.get_device_capability(device)
    fits = [name for name, least in _LEAST_CAPABILITY.items() if capability >= least]
    return *fits, "bf16"


def choose_arithmetic(wish: ArithmeticWish, device: torch.device) -> tuple[Arithmetic, str | None]:
    """The arithmetic for a wish, and for `auto` a sentence that says which and why.

    Raises:
        InputError: the device does not have it.
    """
    check_arithmetic(wish)
    possible = possible_arithmetic(device)
    if wish == "auto":
        why = "exact, and the fastest that this device has"
        if possible[0] != "bf16":
            why = "twice the speed of `bf16`, which is exact, on this device"
        return possible[0], f"arithmetic `{possible[0]}`: {why}"
    if wish not in possible:
        names = ", ".join(f"`{name}`" for name in possible)
        raise InputError(f"`{device}` cannot multiply in `{wish}`", hint=f"it can in {names}")
    return wish, None


def set_arithmetic(blocks: FluxBlocks, arithmetic: Arithmetic) -> int:
    """Let the blocks' NF4 layers multiply so; -> how many do.

    Layers of `KEEPS_BF16`, layers that are not NF4, and those whose size does not fit stay exact.
    """
    num_layers = 0
    for name, layer in blocks.named_modules():
        if isinstance(layer, NF4Linear):
            fits = name not in KEEPS_BF16 and layer.fits_eight_bit
            layer.set_arithmetic(arithmetic if fits else "bf16")
            num_layers += layer.arithmetic == arithmetic
    return num_layers
