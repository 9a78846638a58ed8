"""The denoise loop: from noise, or noise on an image, to latents, one event a step.

The latents stay in float32 from the first step to the last; only the blocks compute in the model's
dtype. A step that finds no memory begins again within a smaller plan.

Shape letters, in this module only:
    B  batch    L  image tokens    D  token channels    S  all tokens    F  half of a head
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from flux_nf4.errors import Cancelled, ShapeError
from flux_nf4.model.rope import rope_table
from flux_nf4.model.step_graph import CaptureError
from flux_nf4.pipeline.conditioning import require_finite
from flux_nf4.pipeline.decode import preview
from flux_nf4.pipeline.events import Notice, StepDone
from flux_nf4.pipeline.model_memory import until_memory_runs_out
from flux_nf4.pipeline.sampling import add_noise, euler_step, guide, predict_image, token_grid

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch import Tensor

    from flux_nf4.pipeline.conditioning import Conditioning
    from flux_nf4.pipeline.image_input import SourceImage
    from flux_nf4.pipeline.load import Model
    from flux_nf4.pipeline.request import GenerationRequest

    # (step, sigma, packed latents) -> the latents to go on with, or None to leave them.
    StepHook: TypeAlias = Callable[[int, float, Tensor], Tensor | None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenoiseLoop:
    """The steps of one batch: its noise, and its image's latents, are (B, L, D) float32."""

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
                        stop_if(is_cancelled)
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


def _is_shown(step: int, num_steps: int, num_previews: int) -> bool:
    """Whether `step` (0 is the first) has one of so many previews, spread evenly."""
    return (step + 1) * num_previews // num_steps > step * num_previews // num_steps


def stop_if(is_cancelled: Callable[[], bool]) -> None:
    """Raises Cancelled where `is_cancelled` says yes."""
    if is_cancelled():
        raise Cancelled("stopped on request")
