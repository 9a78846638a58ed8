"""The way of one image: text, modulation, denoise, decode; told as events, stoppable at each step.

An image to start from is encoded before all of these, and mixed with noise before the first step.

Nothing is printed and nothing is global: the events are the only way out, `is_cancelled` and the
seeds the only ways in. Randomness is drawn in one place, from one generator an image.

Shape letters, in this module only:
    B  batch    L  image tokens    D  token channels    K  steps + 1
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from flux_nf4.errors import ShapeError
from flux_nf4.memory.activations import Workload
from flux_nf4.pipeline.conditioning import condition, encode_text, notices, text_length
from flux_nf4.pipeline.decode import decode_latents, to_pictures
from flux_nf4.pipeline.denoise import DenoiseLoop, stop_if
from flux_nf4.pipeline.events import Event, ImageDone, Notice, StageStarted
from flux_nf4.pipeline.image_input import SourceImage, encode_source
from flux_nf4.pipeline.model_memory import attempt
from flux_nf4.pipeline.request import GenerationRequest
from flux_nf4.pipeline.sampling import (
    LATENT_CHANNELS,
    draw_noise_from,
    make_schedule,
    pack,
    token_grid,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from PIL.Image import Image
    from torch import Tensor

    from flux_nf4.pipeline.denoise import StepHook
    from flux_nf4.pipeline.load import Model

__all__ = ["GenerationRequest", "LatentsDone", "generate", "generate_latents", "workload_of"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatentsDone:
    """A batch is denoised: packed latents (B, L, D) float32, not decoded yet."""

    first_index: int
    tokens: Tensor
    seeds: tuple[int, ...]
    source: SourceImage | None = None


def _never() -> bool:
    return False


def generate(
    model: Model, request: GenerationRequest, *, is_cancelled: Callable[[], bool] = _never
) -> Iterator[Event]:
    """Draw the images of a request, telling each stage, step and image as it is done.

    `is_cancelled` is asked before every step and stage.

    Raises:
        Cancelled: it said yes.
        DoesNotFitError: no plan fits the device's memory.
        InputError: the model's memory is planned, and it is drawing another request.
        NumericalError: a stage gave NaN or infinity; the message names it.
    """
    for event in generate_latents(model, request, is_cancelled=is_cancelled):
        if not isinstance(event, LatentsDone):
            yield event
            continue
        yield StageStarted(stage="decode")
        stop_if(is_cancelled)
        decode = partial(_decode_pictures, model, request, event)
        pictures = yield from attempt(model.memory, decode)
        surprise = model.memory.surprise()
        if surprise is not None:
            yield Notice(message=surprise)
        for offset, (picture, seed) in enumerate(zip(pictures, event.seeds, strict=True)):
            yield ImageDone(index=event.first_index + offset, image=picture, seed=seed)


@torch.inference_mode()
def _decode_pictures(model: Model, request: GenerationRequest, done: LatentsDone) -> list[Image]:
    size = request.width, request.height
    return to_pictures(decode_latents(model, done.tokens, *size, done.source))


@torch.inference_mode()
def generate_latents(
    model: Model,
    request: GenerationRequest,
    *,
    initial_BLD: Tensor | None = None,
    image_noise_1LD: Tensor | None = None,
    on_step: StepHook | None = None,
    is_cancelled: Callable[[], bool] = _never,
) -> Generator[Event | LatentsDone, None, None]:
    """As `generate`, without decoding: `LatentsDone` for each batch in place of `ImageDone`.

    `initial_BLD` replaces the noise that the seeds would give, one row an image. Then
    `image_noise_1LD` draws the sample of the encoded image; without it the mean is taken. Where
    memory is planned, the model is taken until the events end or are closed.

    Raises:
        Cancelled, DoesNotFitError, InputError, NumericalError: as `generate`.
        ShapeError: `initial_BLD`, or what `on_step` gives, is not of the request's size.
    """
    _check_initial(model, request, initial_BLD)
    yield from notices(model, request)
    memory = model.memory
    with memory.drawing():
        yield from attempt(memory, partial(memory.begin, workload_of(model, request)))
        source = yield from _read_source(model, request, is_cancelled)

        yield StageStarted(stage="text")
        stop_if(is_cancelled)
        texts = yield from attempt(memory, partial(encode_text, model, request))

        yield StageStarted(stage="modulation")
        stop_if(is_cancelled)
        rows, columns = token_grid(request.width, request.height)
        sigmas_K = make_schedule(
            request.num_inference_steps, rows * columns, model.facts, kind=request.schedule
        )[-request.num_steps - 1 :]
        conditionings = yield from attempt(
            memory, partial(condition, model, request, texts, sigmas_K)
        )

        yield from attempt(memory, partial(_learn_colours, model, request))
        first = 0
        while first < request.num_images:
            seeds = request.seeds[first : first + (memory.batch_size or request.batch_size)]
            if initial_BLD is None:
                noise_BLD, image_noise_BLD = _draw(seeds, request)
            else:
                noise_BLD = initial_BLD[first : first + len(seeds)]
                image_noise_BLD = image_noise_1LD
            yield StageStarted(stage="denoise")
            noise_BLD, image_BLD = yield from attempt(
                memory, partial(_to_device, model, source, noise_BLD, image_noise_BLD)
            )
            loop = DenoiseLoop(
                model=model,
                request=request,
                conditionings=conditionings,
                sigmas=sigmas_K.tolist(),
                noise=noise_BLD,
                source=source,
                image=image_BLD,
            )
            tokens_BLD = yield from loop.run(on_step, is_cancelled)
            if tokens_BLD is None:
                continue  # with fewer images at once
            yield LatentsDone(first_index=first, tokens=tokens_BLD, seeds=seeds, source=source)
            first += len(seeds)


def _read_source(
    model: Model, request: GenerationRequest, is_cancelled: Callable[[], bool]
) -> Generator[StageStarted | Notice, None, SourceImage | None]:
    if request.image is None:
        return None
    yield StageStarted(stage="encode")
    stop_if(is_cancelled)
    encode = partial(encode_source, model, request.image, request)
    source = yield from attempt(model.memory, encode)
    if source.latent_mask is not None and not source.latent_mask.any():
        yield Notice(message="the mask has no white of 8 x 8 pixels: nothing is drawn anew")
    return source


def _learn_colours(model: Model, request: GenerationRequest) -> None:
    """Let previews be a matter of the latents alone: the autoencoder is not there between steps."""
    if not request.num_previews or model.autoencoder.knows_colours:
        return
    with model.memory.phase("decode"):
        model.autoencoder.colours(torch.zeros(1, LATENT_CHANNELS, 1, 1))


def workload_of(model: Model, request: GenerationRequest) -> Workload:
    """What a request asks of memory: its images of one batch, as many at once as it wants."""
    return Workload(
        width=request.width,
        height=request.height,
        num_images=min(request.batch_size, request.num_images),
        num_steps=request.num_steps,
        num_text_tokens=text_length(model, request),
        is_guided=request.is_guided,
    )


def _draw(seeds: Sequence[int], request: GenerationRequest) -> tuple[Tensor, Tensor | None]:
    """The noise to start from, and that of the image's sample, drawn before it as in Diffusers."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = request.width, request.height
    image_noise_BLD = None
    if request.image is not None:
        image_noise_BLD = pack(draw_noise_from(generators, 1, *size))
    return pack(draw_noise_from(generators, 1, *size)), image_noise_BLD


def _to_device(
    model: Model, source: SourceImage | None, noise_BLD: Tensor, image_noise_BLD: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The noise, and the image's latents as theirs draws them, (B, L, D) float32."""
    noise_BLD = noise_BLD.to(model.device, torch.float32)
    return noise_BLD, None if source is None else source.sample(image_noise_BLD)


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
