"""How long a model takes, and how much memory: one request after another, as people make them.

The first is drawn cold: kernels are compiled and weights arrive while it waits. Those after it are
what is measured. A step is the time between two of the pipeline's own events, with the device's
work done at both, so that nothing of it is left out; the first step of an image, which waits for
what is still on its way, is not counted.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from flux_nf4.pipeline.ceilings import Ceilings, measure_ceilings, synchronize
from flux_nf4.pipeline.events import ImageDone, StageStarted, StepDone
from flux_nf4.pipeline.generate import generate
from flux_nf4.pipeline.png import save_png
from flux_nf4.pipeline.request import GenerationRequest

if TYPE_CHECKING:
    from flux_nf4.pipeline.events import Event
    from flux_nf4.pipeline.load import Model

_LEAST_STEPS = 20  # to be measured, of as many requests as that takes
_MOST_WARM = 5
_PROMPT = "a red apple on a light blue background"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The median of some times in seconds, and where the middle three fifths of them lie."""

    median: float
    p20: float
    p80: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPeak:
    """Bytes on the device: of tensors, of the allocator, and of every process together."""

    allocated: int
    reserved: int
    driver: int

    @classmethod
    def now(cls, device: torch.device) -> MemoryPeak:
        """Since the peak was last set back, and what the driver says at this moment."""
        free, total = torch.cuda.mem_get_info(device)
        return cls(
            allocated=torch.cuda.max_memory_allocated(device),
            reserved=torch.cuda.max_memory_reserved(device),
            driver=total - free,
        )


@dataclass(slots=True, kw_only=True)
class Drawn:
    """What one request took, in seconds; the stages are the pipeline's, and `png`."""

    total_s: float = 0.0
    stages_s: dict[str, float] = field(default_factory=dict)
    steps_s: list[float] = field(default_factory=list)
    peaks: dict[str, MemoryPeak] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What drawing takes: the first request after loading, and those after it.

    `step` is of `batch_size` images at once. `share` is how much of it the device would need at
    its own measured best for the products and the attention alone.
    """

    batch_size: int
    first: Drawn
    warm: Drawn
    step: Spread
    ceilings: Ceilings
    share: float


def spread(seconds: Sequence[float]) -> Spread:
    """Median and percentiles, between two values in proportion: of `[1, 2]` the median is 1.5."""
    several = [*seconds, *seconds[:1]] if len(seconds) == 1 else seconds
    fifths = statistics.quantiles(several, n=5, method="inclusive")
    return Spread(
        median=statistics.median(seconds), p20=fifths[0], p80=fifths[3], count=len(seconds)
    )


def num_requests(num_steps: int) -> int:
    """How many requests are drawn: a cold one, and those that give enough steps."""
    return 1 + min(_MOST_WARM, -(-_LEAST_STEPS // max(1, num_steps - 1)))


def measure_drawing(
    model: Model,
    *,
    size: tuple[int, int],
    num_steps: int,
    batch_size: int = 1,
    on_event: Callable[[Event], None] = lambda _: None,
) -> Measurement:
    """Draw `num_requests`, each of `batch_size` images at once.

    Raises:
        DoesNotFitError, NumericalError: as `generate`.
    """

    def request(number: int) -> GenerationRequest:
        # Each prompt is new: text encoders are not asked twice for the same one.
        return GenerationRequest(
            prompt=f"{_PROMPT}, picture {number}",
            width=size[0],
            height=size[1],
            num_inference_steps=num_steps,
            num_images=batch_size,
            batch_size=batch_size,
        )

    first = draw(model, request(0), on_event)
    warm = [draw(model, request(number), on_event) for number in range(1, num_requests(num_steps))]
    step = spread([step_s for each in warm for step_s in each.steps_s[1:] or each.steps_s])
    at_once = min(batch_size, model.memory.batch_size or batch_size)
    ceilings = measure_ceilings(
        model.transformer.blocks,
        size=size,
        num_text_tokens=model.facts.max_sequence_length,
        batch_size=at_once,
        device=model.device,
        dtype=model.dtype,
        arithmetic=model.arithmetic,
    )
    return Measurement(
        batch_size=at_once,
        first=first,
        warm=min(warm, key=lambda drawn: drawn.total_s),
        step=step,
        ceilings=ceilings,
        share=ceilings.step_s / step.median,
    )


def draw(
    model: Model, request: GenerationRequest, on_event: Callable[[Event], None] = lambda _: None
) -> Drawn:
    """Draw a request up to the bytes of its PNG files, and watch the clock.

    Raises:
        DoesNotFitError, NumericalError: as `generate`.
    """
    drawn, stage = Drawn(), "prepare"
    began_s = since_s = time.perf_counter()
    _reset_peak(model.device)

    def lap() -> float:
        nonlocal since_s
        synchronize(model.device)
        lap_s, since_s = time.perf_counter() - since_s, time.perf_counter()
        drawn.stages_s[stage] = drawn.stages_s.get(stage, 0.0) + lap_s
        return lap_s

    def end_stage() -> None:
        lap()
        if model.device.type == "cuda":
            drawn.peaks[stage] = MemoryPeak.now(model.device)
            _reset_peak(model.device)

    for event in generate(model, request):
        if isinstance(event, StageStarted):
            end_stage()
            stage = event.stage
        elif isinstance(event, StepDone):
            drawn.steps_s.append(lap())
        elif isinstance(event, ImageDone):
            end_stage()
            stage = "png"
            save_png(io.BytesIO(), event.image, {})
            end_stage()
        on_event(event)
    drawn.total_s = time.perf_counter() - began_s
    return drawn


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
