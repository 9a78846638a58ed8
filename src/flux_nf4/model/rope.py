"""Rotary positions of FLUX: three axes (index, row, column) share the channels of a head.

Text tokens sit at position (0, 0, 0); image token (row, column) at (0, row, column).

Shape letters, in this module only:
    B  batch    N  heads    S  tokens (text, then image)    D  head channels    F  D / 2
"""

from __future__ import annotations

import torch
from torch import Tensor

from flux_nf4.model.config import FluxConfig


def rope_table(
    txt_length: int,
    height_tokens: int,
    width_tokens: int,
    config: FluxConfig,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Cosines and sines of every token's rotation: (2, S, F) float32, text tokens first.

    Angles are computed in float64 on the CPU, as Diffusers does, so that every device rotates by
    the same float32 values.
    """
    rows = torch.arange(height_tokens, dtype=torch.float64).repeat_interleave(width_tokens)
    columns = torch.arange(width_tokens, dtype=torch.float64).repeat(height_tokens)
    positions = torch.zeros(txt_length + height_tokens * width_tokens, 3, dtype=torch.float64)
    positions[txt_length:, 1], positions[txt_length:, 2] = rows, columns

    angles = []
    for axis, dim in enumerate(config.axes_dim):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        angles.append(positions[:, axis, None] / config.theta**exponents)
    angle_SF = torch.cat(angles, dim=1)
    return torch.stack((angle_SF.cos(), angle_SF.sin())).float().to(device)


def rotate(x_BNSD: Tensor, rope_2SF: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels by its token's angle: (B, N, S, D) -> same."""
    cos_SF, sin_SF = rope_2SF
    even, odd = x_BNSD.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos_SF - odd * sin_SF, even * sin_SF + odd * cos_SF), -1).flatten(-2)
