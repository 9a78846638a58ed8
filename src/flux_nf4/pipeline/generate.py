"""The way of one image: text, modulation, denoise, decode; told as events, stoppable at each step.

An image to start from is encoded before all of these, and mixed with noise before the first step.

Nothing is printed and nothing is global: the events are the only way out, `is_cancelled` and the
seeds the only ways in. Randomness is drawn in one place, from one generator an image. The latents
stay in float32 from the first step to the last; only the blocks compute in the model's dtype.

Shape letters, in this module only:
    B  batch    L  image tokens    D  token channels    T  text tokens    K  steps + 1
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch

from flux_nf4.errors import Cancelled, ShapeError
from flux_nf4.memory.activations import Workload
from flux_nf4.model.rope import rope_table
from flux_nf4.model.step_graph import CaptureError
from flux_nf4.pipeline.conditioning import (
    Conditioning,
    condition,
    encode_text,
    notices,
    require_finite,
    text_length,
)
from flux_nf4.pipeline.decode import decode_latents, preview, to_pictures
from flux_nf4.pipeline.events import Event, ImageDone, Notice, StageStarted, StepDone
from flux_nf4.pipeline.image_input import SourceImage, encode_source
from flux_nf4.pipeline.model_memory import attempt, until_memory_runs_out
from flux_nf4.pipeline.request import GenerationRequest
from flux_nf4.pipeline.sampling import (
    LATENT_CHANNELS,
    add_noise,
    draw_noise_from,
    euler_step,
    guide,
    make_schedule,
    pack,
    predict_image,
    token_grid,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from PIL.Image import Image
    from torch import Tensor

    from flux_nf4.pipeline.load import Model

    # (step, sigma, packed latents) -> the latents to go on with, or None to leave them.
    StepHook: TypeAlias = Callable[[int, float, Tensor], Tensor | None]

__all__ = ["GenerationRequest", "LatentsDone", "decode_batch", "generate", "generate_latents"]


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
        _stop_if(is_cancelled)
        decode = partial(_decode_pictures, model, request, event)
        pictures = yield from attempt(model.memory, decode)
        surprise = model.memory.surprise()
        if surprise is not None:
            yield Notice(message=surprise)
        for offset, (picture, seed) in enumerate(zip(pictures, event.seeds, strict=True)):
            yield ImageDone(index=event.first_index + offset, image=picture, seed=seed)


@torch.inference_mode()
def _decode_pictures(model: Model, request: GenerationRequest, done: LatentsDone) -> list[Image]:
    return to_pictures(decode_batch(model, request, done))


def decode_batch(model: Model, request: GenerationRequest, done: LatentsDone) -> Tensor:
    """The images of a batch, (B, 3, height, width) float32 in [0, 1].

    Raises:
        NumericalError: the VAE gave NaN or infinity.
    """
    images = decode_latents(model, done.tokens, request.width, request.height)
    return images if done.source is None else done.source.paste(images)


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
        _stop_if(is_cancelled)
        texts = yield from attempt(memory, partial(encode_text, model, request))

        yield StageStarted(stage="modulation")
        _stop_if(is_cancelled)
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
            loop = _Loop(
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
    _stop_if(is_cancelled)
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Loop:
    """The denoise loop of one batch: its noise, and its image's latents, are (B, L, D)."""

    model: Model
    request: GenerationRequest
    conditionings: list[Conditioning]
    sigmas: list[float]
    noise: Tensor
    source: SourceImage | None
    image: Tensor | None

    def run(
        self, on_step: StepHook | None, is_cancelled: Callable[[], bool]
    ) -> Generator[StepDone | Notice, None, Tensor | None]:
        """Noise, or noise on an image -> latents (B, L, D) float32, one event a step.

        None where memory ran out, and is enough for fewer images at once.
        """
        memory, num_steps = self.model.memory, self.request.num_steps
        x_BLD, step = self.noise, 0
        predict: Callable[..., Tensor] | None
        while True:
            refusal = None
            try:
                num_passes = (num_steps - step) * len(self.conditionings)
                # An error holds memory as long as it is known: it is told of out here.
                with until_memory_runs_out(), memory.phase("denoise", num_passes=num_passes):
                    predict = self._predictor(num_passes)
                    if not step:
                        x_BLD = self._noised_image(self.sigmas[0])
                    while step < num_steps:
                        _stop_if(is_cancelled)
                        x_BLD, done = self._step(x_BLD, step, predict, on_step)
                        step += 1
                        yield done
            except CaptureError as error:
                refusal = str(error)
            predict = None  # a graph holds memory, too
            if step == num_steps:
                return x_BLD
            if refusal is not None:
                memory.give_up_graphs()
                yield Notice(message=f"steps run without CUDA graphs: {refusal}")
                continue
            yield Notice(message=memory.shrink())
            if (memory.batch_size or len(x_BLD)) < len(x_BLD):
                return None

    def _predictor(self, num_passes: int) -> Callable[..., Tensor]:
        model, request = self.model, self.request
        rope_2SF = rope_table(
            self.conditionings[0].txt.shape[1],
            *token_grid(request.width, request.height),
            model.transformer.config,
            model.device,
        )
        blocks = model.memory.predictor(model.transformer.blocks, model.device, num_passes)
        return partial(blocks, rope_2SF=rope_2SF)

    def _step(
        self, x_BLD: Tensor, step: int, predict: Callable[..., Tensor], on_step: StepHook | None
    ) -> tuple[Tensor, StepDone]:
        """One step from latents to latents; what came in stays as it is."""
        request, sigmas, num_steps = self.request, self.sigmas, self.request.num_steps
        v_BLD = self._velocity(x_BLD, step, predict)
        require_finite(v_BLD, "denoise", f"step {step + 1} of {num_steps}")
        picture = None
        if _is_shown(step, num_steps, request.num_previews):
            shown = self._kept(predict_image(x_BLD, v_BLD, sigmas[step]), 0)
            picture = preview(self.model, shown, request.width, request.height)
        x_BLD = euler_step(x_BLD, v_BLD, sigmas[step], sigmas[step + 1])
        x_BLD = self._kept(x_BLD, sigmas[step + 1])
        if on_step is not None:
            x_BLD = _replaced(x_BLD, on_step(step, sigmas[step], x_BLD))
        return x_BLD, StepDone(step=step + 1, num_steps=num_steps, preview=picture)

    def _noised_image(self, sigma: float) -> Tensor:
        if self.image is None:
            return self.noise
        return add_noise(self.image, self.noise, sigma)

    def _kept(self, x_BLD: Tensor, sigma: float) -> Tensor:
        """`x_BLD`, and outside a mask the image itself, with the noise that belongs to `sigma`."""
        if self.source is None or self.source.latent_mask is None:
            return x_BLD
        mask_1LD = self.source.latent_mask
        return mask_1LD * x_BLD + (1 - mask_1LD) * self._noised_image(sigma)

    def _velocity(self, x_BLD: Tensor, step: int, predict: Callable[..., Tensor]) -> Tensor:
        # Two passes for true guidance, not one of twice the batch: no more memory than without.
        velocities = [
            predict(
                x_BLD.to(self.model.dtype),
                conditioning.txt.expand(len(x_BLD), -1, -1),
                conditioning.table[step],
            )
            for conditioning in self.conditionings
        ]
        if len(velocities) == 1:
            return velocities[0]
        return guide(velocities[0], velocities[1], self.request.guidance_scale)


def _replaced(x_BLD: Tensor, other: Tensor | None) -> Tensor:
    if other is None:
        return x_BLD
    if other.shape != x_BLD.shape:
        raise ShapeError(
            f"latents of {tuple(other.shape)} cannot take the place of {tuple(x_BLD.shape)}"
        )
    return other.to(x_BLD)


def _stop_if(is_cancelled: Callable[[], bool]) -> None:
    if is_cancelled():
        raise Cancelled("stopped on request")


def _is_shown(step: int, num_steps: int, num_previews: int) -> bool:
    """Whether `step` (0 is the first) has one of so many previews, spread evenly."""
    return (step + 1) * num_previews // num_steps > step * num_previews // num_steps


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
