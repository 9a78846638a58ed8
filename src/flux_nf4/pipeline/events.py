"""What a pipeline tells while it works: plain values, for a front end to print, draw or send.

The pipeline itself never prints. One image gives, in order: `StageStarted` for each stage,
`StepDone` for each denoising step, and `ImageDone`; a `Notice` may come at any point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from PIL.Image import Image

Stage: TypeAlias = Literal["load", "encode", "text", "modulation", "denoise", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStarted:
    """A stage begins."""

    stage: Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """Denoising step `step` of the `num_steps` that are run is done (1 is the first).

    `preview` comes with as many steps as the request asked for.
    """

    step: int
    num_steps: int
    preview: Image | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something the caller should know, in one line: a prompt was truncated, say."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDone:
    """Image `index` of the request (0 is the first), and the seed that repeats it alone."""

    index: int
    image: Image
    seed: int


Event: TypeAlias = StageStarted | StepDone | Notice | ImageDone
