"""What a trained transformer makes of text, for other encoders to learn to be understood by it.

A transformer listens through two layers: one for T5's tokens, one for CLIP's vector. It took most
of its training to connect what comes through them with pictures. New encoders say the same things
in other vectors; if what leaves the two layers is what the old encoders made leave them, the
transformer goes on from what it can draw, not from nothing. The two layers learn along with the
encoders, and take the old ones' place.

Shape letters, in this module only:
    B  batch    T  text tokens    H  hidden size
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_nf4.formats.checkpoint import open_checkpoint
from training.checkpoint import part_of
from training.networks import ClipText, T5Encoder
from training.warm_start import tensors_of

if TYPE_CHECKING:
    from pathlib import Path

    from training.networks import Sizes

# BFL's names of the two layers.
LAYERS = ("txt_in", "vector_in.in_layer")


class Ears(nn.Module):
    """The two layers: T5's tokens and CLIP's vector in, (B, T, H) and (B, H) out."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        shapes = (weights[f"{name}.weight"].shape for name in LAYERS)
        self.layers = nn.ModuleList(nn.Linear(columns, rows) for rows, columns in shapes)
        self.load(weights)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over both layers' weights, among others, under BFL's names."""
        for name, layer in zip(LAYERS, self.layers, strict=True):
            layer.load_state_dict(part_of(weights, name))

    def forward(self, encoded: tuple[Tensor, Tensor]) -> list[Tensor]:
        """What the transformer gets to hear: T5's tokens and CLIP's vector -> what both become."""
        return [layer(part) for layer, part in zip(self.layers, encoded, strict=True)]

    def tensors(self) -> dict[str, Tensor]:
        """The layers' weights under BFL's names."""
        return {
            f"{name}.{inner}": tensor
            for name, layer in zip(LAYERS, self.layers, strict=True)
            for inner, tensor in layer.state_dict().items()
        }


class Listener:
    """The text layers of a file's transformer with the encoders it knows, and ears for new ones."""

    def __init__(self, file: Path, sizes: Sizes) -> None:
        components = open_checkpoint(file).components
        self.t5, self.clip = T5Encoder(sizes), ClipText(sizes)
        self.t5.load_state_dict(tensors_of(components["t5"]))
        self.clip.load_state_dict(tensors_of(components["clip"]))
        weights = tensors_of(components["transformer"])
        self._old_ears, self.ears = Ears(weights), Ears(weights)

    def missed(self, ids: tuple[Tensor, Tensor], encoded: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Which share of the variance of what it used to hear it misses, of T5 and of CLIP.

        `ids` are captions, (B, T) for each encoder, and `encoded` what the new encoders make of
        them.
        """
        t5_BT, clip_BT = ids
        with torch.no_grad():
            wanted = self._old_ears((self.t5(t5_BT), self.clip(clip_BT)))
        return [
            F.mse_loss(heard, before) / before.var()
            for heard, before in zip(self.ears(encoded), wanted, strict=True)
        ]
