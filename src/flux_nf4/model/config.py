"""The sizes of a FLUX transformer. Everything else about it follows from these numbers."""

from __future__ import annotations

from dataclasses import dataclass

from flux_nf4.errors import InputError

MLP_RATIO = 4  # of every published FLUX.1; the layer shapes below take it as given
TIME_CHANNELS = 256  # sinusoidal channels of the timestep and guidance embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class FluxConfig:
    """Sizes of one transformer; the defaults are FLUX.1-dev's.

    `in_channels` is what a packed image token holds (64 for text to image, 384 for Fill, 128 for
    Canny and Depth); `out_channels` what one predicts. `axes_dim` divides a head among the three
    position axes (index, row, column), in channels.

    Raises:
        InputError: the sizes contradict each other.
    """

    in_channels: int = 64
    out_channels: int = 64
    hidden_size: int = 3072
    num_heads: int = 24
    num_double_blocks: int = 19
    num_single_blocks: int = 38
    context_dim: int = 4096
    pooled_dim: int = 768
    axes_dim: tuple[int, int, int] = (16, 56, 56)
    theta: float = 10_000.0
    guidance_embed: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"a hidden size of {self.hidden_size} does not divide into {self.num_heads} heads"
            )
        if sum(self.axes_dim) != self.head_dim or any(dim % 2 for dim in self.axes_dim):
            raise InputError(
                f"position axes {self.axes_dim} must be even and add up to the head's "
                f"{self.head_dim} channels"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def modulation_width(self) -> int:
        """Length of one row of the modulation table: every adaLN vector of one step."""
        double, single = 12 * self.num_double_blocks, 3 * self.num_single_blocks
        return (double + single + 2) * self.hidden_size


def axes_for_head(head_dim: int) -> tuple[int, int, int]:
    """Divide a head among the position axes as FLUX.1 does: 1/8, 7/16, 7/16 (128: 16, 56, 56)."""
    return head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16
