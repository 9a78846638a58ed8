"""The conditioner: from timestep, guidance and pooled text to every adaLN vector of a step.

A quarter of FLUX's weights (3.2 of 11.9 billion) sit in modulation layers that see one vector a
step, and what they see depends on nothing that the denoise loop computes. So they are a network
of their own: it runs once for all steps, its output is a table of a few megabytes, and its
weights can leave the device before the loop starts.

Shape letters, in this module only:
    S  steps    B  batch    H  hidden size    P  pooled text channels    M  modulation width
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_nf4.errors import InputError
from flux_nf4.model.config import TIME_CHANNELS, FluxConfig

# The network was trained on timesteps and guidance scales in thousandths.
TIME_FACTOR = 1000.0
MAX_PERIOD = 10_000.0


def sinusoidal_embedding(values_B: Tensor) -> Tensor:
    """Cosines, then sines, of a value at 128 frequencies: (B,) -> (B, 256) float32."""
    half = TIME_CHANNELS // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values_B.device) / half
    frequencies = torch.exp(-math.log(MAX_PERIOD) * exponents)
    angles = TIME_FACTOR * values_B.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class MLPEmbedder(nn.Module):
    """Two linear layers around a SiLU."""

    def __init__(self, in_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in) -> (B, H)."""
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """The layer that makes `num_vectors` adaLN vectors for one stream of one block."""

    def __init__(self, hidden_size: int, num_vectors: int) -> None:
        super().__init__()
        self.lin = nn.Linear(hidden_size, num_vectors * hidden_size)

    def forward(self, activated_BH: Tensor) -> Tensor:
        """(B, H) -> (B, num_vectors * H)."""
        return self.lin(activated_BH)


class DoubleModulation(nn.Module):
    """Both streams of a double block: shift, scale, gate for attention, then for the MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.img_mod = Modulation(hidden_size, 6)
        self.txt_mod = Modulation(hidden_size, 6)

    def forward(self, activated_BH: Tensor) -> Tensor:
        """(B, H) -> (B, 12 * H), the image stream's six vectors first."""
        return torch.cat((self.img_mod(activated_BH), self.txt_mod(activated_BH)), dim=-1)


class SingleModulation(nn.Module):
    """A single block: shift, scale, gate."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.modulation = Modulation(hidden_size, 3)

    def forward(self, activated_BH: Tensor) -> Tensor:
        """(B, H) -> (B, 3 * H)."""
        return self.modulation(activated_BH)


class FinalModulation(nn.Module):
    """The last layer: shift, scale."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        # BFL's name is `adaLN_modulation.1`: its SiLU, at 0, is applied once for all layers here.
        self.adaLN_modulation = nn.Sequential(
            nn.Identity(), nn.Linear(hidden_size, 2 * hidden_size)
        )

    def forward(self, activated_BH: Tensor) -> Tensor:
        """(B, H) -> (B, 2 * H)."""
        return self.adaLN_modulation(activated_BH)


class Conditioner(nn.Module):
    """Embeds timestep, guidance and pooled text, and makes rows of the modulation table.

    A row holds, in this order: for each double block the six vectors of the image stream and the
    six of the text stream; for each single block three; for the final layer two.
    `FluxBlocks` reads it back in the same order.
    """

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        hidden_size = config.hidden_size
        self.time_in = MLPEmbedder(TIME_CHANNELS, hidden_size)
        self.vector_in = MLPEmbedder(config.pooled_dim, hidden_size)
        self.guidance_in = (
            MLPEmbedder(TIME_CHANNELS, hidden_size) if config.guidance_embed else None
        )
        self.double_blocks = nn.ModuleList(
            DoubleModulation(hidden_size) for _ in range(config.num_double_blocks)
        )
        self.single_blocks = nn.ModuleList(
            SingleModulation(hidden_size) for _ in range(config.num_single_blocks)
        )
        self.final_layer = FinalModulation(hidden_size)

    def forward(self, timestep_B: Tensor, guidance_B: Tensor | None, pooled_BP: Tensor) -> Tensor:
        """One row a sample: (B,), (B,), (B, P) -> (B, M), in the dtype of `pooled_BP`.

        `timestep_B` runs from 1 (noise) to 0 (image); `guidance_B` is the distilled guidance scale.

        Raises:
            InputError: guidance is missing where the model embeds it, or given where it does not.
        """
        dtype = pooled_BP.dtype
        vector_BH = self.time_in(sinusoidal_embedding(timestep_B).to(dtype))
        vector_BH = vector_BH + self.vector_in(pooled_BP)
        if (self.guidance_in is None) != (guidance_B is None):
            raise InputError(
                "this model embeds a guidance scale, and none was given"
                if guidance_B is None
                else "a guidance scale was given, and this model does not embed one"
            )
        if self.guidance_in is not None and guidance_B is not None:
            vector_BH = vector_BH + self.guidance_in(sinusoidal_embedding(guidance_B).to(dtype))
        activated_BH = F.silu(vector_BH)

        layers = (*self.double_blocks, *self.single_blocks, self.final_layer)
        return torch.cat([layer(activated_BH) for layer in layers], dim=-1)

    def table(self, timesteps_S: Tensor, guidance_B: Tensor | None, pooled_BP: Tensor) -> Tensor:
        """Every row of every step in one pass: (S,), (B,), (B, P) -> (S, B, M).

        Row [s] equals `forward` at timestep s; each weight is read once instead of S times.
        """
        num_steps, batch = len(timesteps_S), len(pooled_BP)
        rows = self(
            timesteps_S.repeat_interleave(batch),
            None if guidance_B is None else guidance_B.repeat(num_steps),
            pooled_BP.repeat(num_steps, 1),
        )
        return rows.unflatten(0, (num_steps, batch))
