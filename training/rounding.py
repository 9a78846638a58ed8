"""What shipping does to the weights, as an exact rounding of values that training can see.

The all-in-one layout holds every Linear weight of the transformer in NF4 (blocks of 64), its
biases in bfloat16, T5 in float8_e4m3 and CLIP in float16. `Rounding` puts the rounded values in
place for a forward and backward pass and gives the masters back before the step: the
straight-through estimator. Nothing here waits for the device, so a step that rounds can be
captured in a CUDA graph.

Shape letters, in this module only:
    G  blocks of 64 values
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flux_nf4.nf4.codec import levels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

BLOCK_SIZE = 64


class NF4Rounder:
    """Nearest NF4 values of bfloat16-rounded weights, many matrices in one go."""

    def __init__(self, device: torch.device) -> None:
        self.levels_16 = levels("nf4").to(device)
        self.midpoints_15 = (self.levels_16[1:] + self.levels_16[:-1]) / 2

    def __call__(self, weights: list[Tensor]) -> list[Tensor]:
        """Matrices whose values fill blocks -> what each decodes to, float32, same shapes."""
        flat_GS = torch.cat([weight.bfloat16().reshape(-1, BLOCK_SIZE) for weight in weights])
        flat_GS = flat_GS.float()
        absmax_G1 = flat_GS.abs().amax(dim=1, keepdim=True)
        # The smallest normal number keeps a block of zeros at zero.
        scaled_GS = flat_GS * (1.0 / absmax_G1.clamp(min=1.2e-38))
        codes_GS = torch.bucketize(scaled_GS, self.midpoints_15)
        return parted((self.levels_16[codes_GS] * absmax_G1).flatten(), weights)


def joined(tensors: list[Tensor]) -> Tensor:
    """The values of many tensors in one row: a step that rounds runs few kernels, not hundreds."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def parted(row: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The inverse of `joined`: views of the row in the shapes of these tensors."""
    parts = row.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def to_e4m3(weights: list[Tensor]) -> list[Tensor]:
    """The nearest float8_e4m3 values, as float32; beyond 448 they saturate."""
    row = joined(weights).clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32)
    return parted(row, weights)


def to_bfloat16(weights: list[Tensor]) -> list[Tensor]:
    """The nearest bfloat16 values, as float32."""
    return parted(joined(weights).bfloat16().float(), weights)


def to_float16(weights: list[Tensor]) -> list[Tensor]:
    """The nearest float16 values, as float32."""
    return parted(joined(weights).half().float(), weights)


class Rounding:
    """Parameters and how each group of them is rounded; a context manager around one pass."""

    def __init__(self) -> None:
        self._groups: list[tuple[list[Tensor], Callable[[list[Tensor]], list[Tensor]]]] = []
        self._masters: list[list[Tensor]] = []

    def add(
        self, parameters: Iterable[Tensor], function: Callable[[list[Tensor]], list[Tensor]]
    ) -> Rounding:
        """Round these parameters with `function`, which takes and returns lists."""
        group = [parameter.detach() for parameter in parameters]
        if group:
            self._groups.append((group, function))
        return self

    @torch.no_grad()
    def apply(self) -> None:
        """Round in place, for good."""
        for group, function in self._groups:
            torch._foreach_copy_(group, function(group))

    @torch.no_grad()
    def __enter__(self) -> None:
        self._masters = [parted(joined(group), group) for group, _ in self._groups]
        self.apply()

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for (group, _), masters in zip(self._groups, self._masters, strict=True):
            torch._foreach_copy_(group, masters)
        self._masters = []


def linear_weights(module: nn.Module) -> list[Tensor]:
    """Every Linear's weight: what the all-in-one layout holds in NF4."""
    return [layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)]


def linear_biases(module: nn.Module) -> list[Tensor]:
    """Every Linear's bias: what the all-in-one layout holds in bfloat16."""
    return [
        layer.bias
        for layer in module.modules()
        if isinstance(layer, nn.Linear) and layer.bias is not None
    ]


def shipped_transformer(transformer: nn.Module, device: torch.device) -> Rounding:
    """The transformer as it ships: NF4 matrices, bfloat16 biases, float32 norm scales."""
    rounding = Rounding().add(linear_weights(transformer), NF4Rounder(device))
    return rounding.add(linear_biases(transformer), to_bfloat16)


def shipped_text(t5: nn.Module, clip: nn.Module) -> Rounding:
    """The text encoders as they ship: T5 in float8_e4m3, CLIP in float16."""
    return Rounding().add(t5.parameters(), to_e4m3).add(clip.parameters(), to_float16)
