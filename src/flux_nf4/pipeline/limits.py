"""What an image may be: sizes, steps, seeds. Without torch, so that a front end knows at once."""

from __future__ import annotations

from typing import Literal, TypeAlias

from flux_nf4.errors import InputError

ScheduleKind: TypeAlias = Literal["flux", "forge"]

PIXELS_PER_TOKEN = 16  # two latents a token, in both directions
MIN_SIZE, MAX_SIZE = 64, 4096  # pixels, each side
MAX_STEPS = 1000  # the steps the model was trained with; finer ones do not exist for it
MAX_SEED = 2**64 - 1


def nearest_sizes(size: int) -> tuple[int, ...]:
    """The legal sizes next to `size`, in pixels: itself, or the two around it, or the limit."""
    if size <= MIN_SIZE:
        return (MIN_SIZE,)
    if size >= MAX_SIZE:
        return (MAX_SIZE,)
    below = size - size % PIXELS_PER_TOKEN
    return (size,) if below == size else (below, below + PIXELS_PER_TOKEN)


def check_size(width: int, height: int) -> None:
    """Accept an image size that FLUX can draw.

    Raises:
        InputError: a side is not a multiple of 16, or not within 64 to 4096.
    """
    for name, size in (("width", width), ("height", height)):
        if isinstance(size, bool) or not isinstance(size, int):
            raise InputError(f"{name} must be a whole number of pixels, got `{size!r}`")
        nearest = nearest_sizes(size)
        if nearest == (size,):
            continue
        choice = " or ".join(str(legal) for legal in nearest)
        raise InputError(
            f"a {name} of {size} pixels cannot be drawn: sizes are multiples of "
            f"{PIXELS_PER_TOKEN} from {MIN_SIZE} to {MAX_SIZE}",
            hint=f"use a {name} of {choice}",
        )
