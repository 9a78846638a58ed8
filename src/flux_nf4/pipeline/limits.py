"""What an image may be: sizes, steps, seeds. Without torch, so that a front end knows at once."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from flux_nf4.errors import InputError

ScheduleKind: TypeAlias = Literal["flux", "forge"]

PIXELS_PER_TOKEN = 16  # two latents a token, in both directions
MIN_SIZE, MAX_SIZE = 64, 4096  # pixels, each side
MAX_STEPS = 1000  # the steps the model was trained with; finer ones do not exist for it
MAX_SEED = 2**64 - 1
DEFAULT_STRENGTH = 0.6  # Diffusers'
DEFAULT_DISTILLED_GUIDANCE = 3.5
_DEFAULT_STEPS = 20
_SCHNELL_STEPS = 4  # what it was distilled for


def default_steps(variant: str) -> int:
    """The steps of an image for which no number of them is given."""
    return _SCHNELL_STEPS if variant == "schnell" else _DEFAULT_STEPS


def nearest_sizes(size: int) -> tuple[int, ...]:
    """The legal sizes next to `size`, in pixels: itself, or the two around it, or the limit."""
    if size <= MIN_SIZE:
        return (MIN_SIZE,)
    if size >= MAX_SIZE:
        return (MAX_SIZE,)
    below = size - size % PIXELS_PER_TOKEN
    return (size,) if below == size else (below, below + PIXELS_PER_TOKEN)


def size_like(
    image_size: tuple[int, int], *, width: int | None, height: int | None, default_size: int
) -> tuple[int, int]:
    """The legal size for drawing anew an image of `image_size`, both as (width, height).

    A side that is given stays, and the other follows the image's shape. Where neither is, the
    image keeps its size, but for an area beyond that of the model's `default_size`.
    """
    image_width, image_height = image_size
    if width is not None:
        scale = width / image_width
    elif height is not None:
        scale = height / image_height
    else:
        scale = min(1.0, default_size / math.sqrt(image_width * image_height))
    return (
        _nearest_legal(image_width * scale) if width is None else width,
        _nearest_legal(image_height * scale) if height is None else height,
    )


def _nearest_legal(side: float) -> int:
    whole = PIXELS_PER_TOKEN * round(side / PIXELS_PER_TOKEN)
    return min(max(whole, MIN_SIZE), MAX_SIZE)


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
