"""The way of one image: text, modulation, denoise, decode; told as events, stoppable at each step.

Nothing is printed and nothing is global: the events are the only way out, `is_cancelled` and the
seeds the only ways in. Randomness is drawn in one place, from one generator an image. The latents
stay in float32 from the first step to the last; only the blocks compute in the model's dtype.

Shape letters, in this module only:
    B  batch    L  image tokens    D  token channels    T  text tokens    K  steps + 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from flux_nf4.errors import Cancelled, ShapeError
from flux_nf4.model.rope import rope_table
from flux_nf4.pipeline.conditioning import (
    Conditioning,
    condition,
    encode_text,
    notices,
    require_finite,
)
from flux_nf4.pipeline.decode import decode_latents, preview, to_pictures
from flux_nf4.pipeline.events import Event, ImageDone, StageStarted, StepDone
from flux_nf4.pipeline.request import GenerationRequest
from flux_nf4.pipeline.sampling import (
    draw_noise,
    euler_step,
    guide,
    make_schedule,
    pack,
    predict_image,
    token_grid,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from torch import Tensor

    from flux_nf4.pipeline.load import Model

    # (step, sigma, packed latents) -> the latents to go on with, or None to leave them.
    StepHook: TypeAlias = Callable[[int, float, Tensor], Tensor | None]

__all__ = ["GenerationRequest", "LatentsDone", "generate", "generate_latents"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatentsDone:
    """A batch is denoised: packed latents (B, L, D) float32, not decoded yet."""

    first_index: int
    tokens: Tensor
    seeds: tuple[int, ...]


def _never() -> bool:
    return False


def generate(
    model: Model, request: GenerationRequest, *, is_cancelled: Callable[[], bool] = _never
) -> Iterator[Event]:
    """Draw the images of a request, telling each stage, step and image as it is done.

    `is_cancelled` is asked before every step and stage.

    Raises:
        Cancelled: it said yes.
        NumericalError: a stage gave NaN or infinity; the message names it.
    """
    for event in generate_latents(model, request, is_cancelled=is_cancelled):
        if not isinstance(event, LatentsDone):
            yield event
            continue
        yield StageStarted(stage="decode")
        _stop_if(is_cancelled)
        with torch.inference_mode():
            images = decode_latents(model, event.tokens, request.width, request.height)
            pictures = to_pictures(images)
        for offset, (picture, seed) in enumerate(zip(pictures, event.seeds, strict=True)):
            yield ImageDone(index=event.first_index + offset, image=picture, seed=seed)


@torch.inference_mode()
def generate_latents(
    model: Model,
    request: GenerationRequest,
    *,
    initial_BLD: Tensor | None = None,
    on_step: StepHook | None = None,
    is_cancelled: Callable[[], bool] = _never,
) -> Iterator[Event | LatentsDone]:
    """As `generate`, without decoding: `LatentsDone` for each batch in place of `ImageDone`.

    `initial_BLD` replaces the noise that the seeds would give, one row an image.

    Raises:
        Cancelled, NumericalError: as `generate`.
        ShapeError: `initial_BLD` is not of the request's size.
    """
    _check_initial(model, request, initial_BLD)
    yield from notices(model, request)

    yield StageStarted(stage="text")
    _stop_if(is_cancelled)
    texts = encode_text(model, request)

    yield StageStarted(stage="modulation")
    _stop_if(is_cancelled)
    rows, columns = token_grid(request.width, request.height)
    sigmas_K = make_schedule(
        request.num_inference_steps, rows * columns, model.facts, kind=request.schedule
    )
    conditionings = condition(model, request, texts, sigmas_K)

    for first in range(0, request.num_images, request.batch_size):
        seeds = request.seeds[first : first + request.batch_size]
        if initial_BLD is None:
            noise_BLD = pack(draw_noise(seeds, request.width, request.height))
        else:
            noise_BLD = initial_BLD[first : first + request.batch_size]
        yield StageStarted(stage="denoise")
        loop = _Loop(model=model, request=request, conditionings=conditionings, sigmas=sigmas_K)
        tokens_BLD = yield from loop.run(noise_BLD, on_step, is_cancelled)
        yield LatentsDone(first_index=first, tokens=tokens_BLD, seeds=seeds)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Loop:
    """The denoise loop of one batch."""

    model: Model
    request: GenerationRequest
    conditionings: list[Conditioning]
    sigmas: Tensor

    def run(
        self, noise_BLD: Tensor, on_step: StepHook | None, is_cancelled: Callable[[], bool]
    ) -> Generator[StepDone, None, Tensor]:
        """Noise (B, L, D) -> latents (B, L, D) float32, one event a step."""
        model, request = self.model, self.request
        rope = rope_table(
            self.conditionings[0].txt.shape[1],
            *token_grid(request.width, request.height),
            model.transformer.config,
            model.device,
        )
        sigmas = self.sigmas.tolist()
        x_BLD = noise_BLD.to(model.device, torch.float32)
        for step in range(request.num_inference_steps):
            _stop_if(is_cancelled)
            v_BLD = self._velocity(x_BLD, step, rope)
            require_finite(v_BLD, "denoise", f"step {step + 1} of {request.num_inference_steps}")
            shown = predict_image(x_BLD, v_BLD, sigmas[step]) if request.preview else None
            x_BLD = euler_step(x_BLD, v_BLD, sigmas[step], sigmas[step + 1])
            if on_step is not None:
                replaced = on_step(step, sigmas[step], x_BLD)
                x_BLD = x_BLD if replaced is None else replaced.to(x_BLD)
            yield StepDone(
                step=step + 1,
                num_steps=request.num_inference_steps,
                preview=None
                if shown is None
                else preview(model, shown, request.width, request.height),
            )
        return x_BLD

    def _velocity(self, x_BLD: Tensor, step: int, rope: Tensor) -> Tensor:
        # Two passes for true guidance, not one of twice the batch: no more memory than without.
        velocities = [
            self.model.transformer.blocks(
                x_BLD.to(self.model.dtype),
                conditioning.txt.expand(len(x_BLD), -1, -1),
                conditioning.table[step],
                rope,
            )
            for conditioning in self.conditionings
        ]
        if len(velocities) == 1:
            return velocities[0]
        return guide(velocities[0], velocities[1], self.request.guidance_scale)


def _stop_if(is_cancelled: Callable[[], bool]) -> None:
    if is_cancelled():
        raise Cancelled("stopped on request")


def _check_initial(model: Model, request: GenerationRequest, initial_BLD: Tensor | None) -> None:
    if initial_BLD is None:
        return
    rows, columns = token_grid(request.width, request.height)
    expected = (request.num_images, rows * columns, model.transformer.config.in_channels)
    if tuple(initial_BLD.shape) != expected:
        raise ShapeError(
            f"initial latents of {tuple(initial_BLD.shape)} are not {expected}: images, tokens of "
            f"{request.width} x {request.height} pixels, channels"
        )
