"""`FluxPipeline`: the few lines of Python that people already write, for every file they have.

The call looks like Diffusers', with two differences that are stated and not hidden:
`guidance_scale` is true classifier-free guidance (1 is off), and `distilled_guidance_scale` is
what FLUX.1-dev embeds; a seed may be given in place of a generator.
"""

from __future__ import annotations

import contextlib
import secrets
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from PIL import Image

from flux_nf4.errors import DoesNotFitError, InputError
from flux_nf4.pipeline.bnb_config import parse_dtype, parse_quantization_config
from flux_nf4.pipeline.decode import decode_latents, to_pictures
from flux_nf4.pipeline.generate import LatentsDone, generate_latents
from flux_nf4.pipeline.image_file import upright_size
from flux_nf4.pipeline.limits import DEFAULT_STRENGTH, MAX_SEED, check_size, size_like
from flux_nf4.pipeline.load import (
    LoadSettings,
    Model,
    imitates_bfloat16,
    load_model,
    resolve_device,
)
from flux_nf4.pipeline.model_memory import until_memory_runs_out
from flux_nf4.pipeline.request import GenerationRequest, check_whole_number
from flux_nf4.pipeline.sampling import draw_noise_from, pack
from flux_nf4.pipeline.warm_up import warm_up as draw_and_drop

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from torch import Generator, Tensor

    from flux_nf4.pipeline.denoise import StepHook

    Images: TypeAlias = list[Image.Image] | np.ndarray[Any, np.dtype[np.float32]] | Tensor
    StepCallback: TypeAlias = Callable[
        ["FluxPipeline", int, float, dict[str, Tensor]], dict[str, Tensor] | None
    ]

OutputType: TypeAlias = Literal["pil", "np", "pt", "latent"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FluxPipelineOutput:
    """What a call gives: images in the form asked for, and each one's seed (None: a generator's).

    `pil`: a list of pictures. `np`: (N, H, W, 3) float32 in [0, 1]. `pt`: (N, 3, H, W), the same.
    `latent`: (N, tokens, 64), packed and not decoded, as Diffusers gives them.
    """

    images: Images
    seeds: tuple[int | None, ...]


class FluxPipeline:
    """A FLUX.1 pipeline on NF4, FP4 or plain weights: from text, an image, or a masked image."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype | str | None = None,
        device_map: str | None = "auto",
        quantization_config: object | None = None,
        warm_up: bool = False,
    ) -> FluxPipeline:
        """Load an all-in-one file, a folder that holds exactly one, or a Diffusers folder.

        `quantization_config` states the wished format: a dict with BitsAndBytesConfig's four-bit
        keys, or such an object. Plain weights are quantised while loading; weights that are
        quantised already must agree with it. `device_map`: `auto`, or the name of a device.
        With `warm_up` it draws some steps at once, so that the first image, of the model's own
        size, takes as long as those after it; on a GPU most of that is done while weights load.
        A CPU that has no arithmetic for bfloat16 computes in float32, and a warning says so.

        Raises:
            ModelNotFoundError: nothing is there, or a part is missing.
            FormatError: a file is damaged.
            InputError: two files, an unknown key, or a wish that the file does not meet.
        """
        if device_map is not None and not isinstance(device_map, str):
            raise InputError(f"`device_map` must be `auto` or a device, got `{device_map!r}`")
        dtype = None if torch_dtype in (None, "auto") else parse_dtype("torch_dtype", torch_dtype)
        wish = None
        if quantization_config is not None:
            wish, compute_dtype = parse_quantization_config(quantization_config)
            if dtype and compute_dtype and dtype != compute_dtype:
                raise InputError(
                    f"`torch_dtype` {dtype} and `bnb_4bit_compute_dtype` {compute_dtype} disagree",
                    hint="give one of them, or the same twice",
                )
            dtype = dtype or compute_dtype
        device = device_map or "auto"
        # The CPU first: to ask for devices starts CUDA, which `load_model` does beside other work.
        is_slow = dtype == torch.bfloat16 and imitates_bfloat16()
        if is_slow and resolve_device(device).type == "cpu":
            dtype = torch.float32
            warnings.warn(
                "this CPU has no arithmetic for bfloat16: computing in float32", stacklevel=2
            )
        settings = LoadSettings(device=device, dtype=dtype, quantization=wish)
        model = load_model(Path(pretrained_model_name_or_path), settings)
        if warm_up:
            with contextlib.suppress(DoesNotFitError):  # a smaller image may
                draw_and_drop(model)
        return cls(model)

    def __call__(  # noqa: PLR0913  the arguments are Diffusers'
        self,
        prompt: str | Sequence[str],
        *,
        image: Image.Image | None = None,
        mask_image: Image.Image | None = None,
        strength: float = DEFAULT_STRENGTH,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        distilled_guidance_scale: float = 3.5,
        seed: int | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        max_sequence_length: int | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
    ) -> FluxPipelineOutput:
        """Draw `num_images_per_prompt` images of each prompt, one image at a time.

        Image `i` of the call has the seed `seed + i`; without a seed one is drawn and told in the
        output. A `generator` gives the noise that Diffusers would draw from it; `latents` is
        noise of your own, packed (N, tokens, 64). Sizes are in pixels, by default the model's own.
        With an `image` all of them start from it, by default at its size; `strength` and
        `mask_image` are as in `GenerationRequest`. Images as `pt` or `latent` stay on the device.
        `callback_on_step_end(pipeline, step, timestep, {"latents": ...})` may return other latents.

        Raises:
            InputError: a value is out of range or of the wrong kind.
            DoesNotFitError: no plan fits the device's memory.
            NumericalError: a stage gave NaN or infinity.
        """
        _check_output_type(output_type)
        _check_rivals(seed, generator, image, latents)
        prompts, negatives = _pair_prompts(prompt, negative_prompt)
        width, height = self._size(image, width, height)
        template = GenerationRequest(
            prompt="",
            width=width,
            height=height,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            distilled_guidance_scale=distilled_guidance_scale,
            num_images=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
            image=image,
            mask_image=mask_image,
            strength=strength,
        )
        num_images = num_images_per_prompt * len(prompts)
        noise, image_noise = _initial_noise(latents, generator, num_images, template)
        first_seed = secrets.randbelow(2**32) if seed is None else seed
        check_whole_number("seed", first_seed, 0, MAX_SEED)
        # All of them first: what is wrong with the last one is told before the first is drawn.
        requests = _requests(template, prompts, negatives, first_seed)

        on_step = self._step_hook(callback_on_step_end)
        done: list[Images] = []
        noises = [None] * len(requests) if noise is None else noise.split(num_images_per_prompt)
        for request, rows in zip(requests, noises, strict=True):
            drawing = generate_latents(
                self.model, request, initial_BLD=rows, image_noise_1LD=image_noise, on_step=on_step
            )
            with closing(drawing):  # an error's traceback may outlive it
                done += [
                    self._finish(event, request, output_type)
                    for event in drawing
                    if isinstance(event, LatentsDone)
                ]
        seeds = [None if noise is not None else first_seed + i for i in range(num_images)]
        return FluxPipelineOutput(images=_collect(done), seeds=tuple(seeds))

    def _finish(self, event: LatentsDone, request: GenerationRequest, output_type: str) -> Images:
        """A batch in its last form: pictures and arrays leave the device."""
        if output_type == "latent":
            return event.tokens.clone()
        while True:
            with until_memory_runs_out():
                images = _decode(self.model, request, event)
                if output_type == "np":
                    return images.permute(0, 2, 3, 1).cpu().numpy()
                return to_pictures(images) if output_type == "pil" else images
            self.model.memory.shrink()

    def _size(self, image: object, width: int | None, height: int | None) -> tuple[int, int]:
        size = self.model.facts.default_size
        width_or_default = size if width is None else width
        height_or_default = size if height is None else height
        check_size(width_or_default, height_or_default)
        if not isinstance(image, Image.Image) or 0 in image.size:  # none, or one to be refused
            return width_or_default, height_or_default
        return size_like(upright_size(image), width=width, height=height, default_size=size)

    def _step_hook(self, callback: StepCallback | None) -> StepHook | None:
        if callback is None:
            return None

        def on_step(step: int, sigma: float, latents: Tensor) -> Tensor | None:
            returned = callback(self, step, 1000 * sigma, {"latents": latents})
            return None if returned is None else returned.get("latents")

        return on_step


def _decode(model: Model, request: GenerationRequest, event: LatentsDone) -> Tensor:
    with torch.inference_mode():
        size = request.width, request.height
        images = decode_latents(model, event.tokens, *size, event.source)
    # A clone made out here is an ordinary tensor, which autograd and in-place changes accept.
    return images.clone()


def _check_output_type(output_type: object) -> None:
    if output_type not in get_args(OutputType):
        names = ", ".join(f"`{name}`" for name in get_args(OutputType))
        raise InputError(f"`output_type` must be one of {names}, got `{output_type!r}`")


def _check_rivals(seed: object, generator: object, image: object, latents: object) -> None:
    if seed is not None and generator is not None:
        raise InputError("`seed` and `generator` both fix the noise: give one of them")
    if image is not None and latents is not None:
        raise InputError("`image` and `latents` both say where to start: give one of them")


def _pair_prompts(prompt: object, negative_prompt: object) -> tuple[list[str], list[str]]:
    prompts = _as_texts("prompt", prompt)
    if not prompts:
        raise InputError("`prompt` is an empty list")
    negatives = [""] if negative_prompt is None else _as_texts("negative_prompt", negative_prompt)
    if len(negatives) == 1:
        negatives *= len(prompts)
    if len(negatives) != len(prompts):
        raise InputError(f"{len(prompts)} prompts and {len(negatives)} negative prompts")
    return prompts, negatives


def _as_texts(name: str, value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Sequence) and all(isinstance(text, str) for text in value):
        return list(value)
    raise InputError(f"`{name}` must be a text or a list of texts, got `{type(value).__name__}`")


def _requests(
    template: GenerationRequest, prompts: list[str], negatives: list[str], first_seed: int
) -> list[GenerationRequest]:
    """One a prompt; seeds count on from each to the next."""
    return [
        replace(
            template,
            prompt=prompt,
            negative_prompt=negative,
            seed=first_seed + i * template.num_images,
        )
        for i, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True))
    ]


def _initial_noise(
    latents: Tensor | None,
    generator: Generator | Sequence[Generator] | None,
    num_images: int,
    request: GenerationRequest,
) -> tuple[Tensor | None, Tensor | None]:
    """The noise of every image, and that of the one encoded image; None: the seeds give it."""
    if latents is not None:
        _check_latents(latents, num_images)
        return latents, None
    if generator is None:
        return None, None
    size = request.width, request.height
    generators = list(generator) if isinstance(generator, Sequence) else [generator]
    if not all(isinstance(each, torch.Generator) for each in generators):
        raise InputError(
            f"`generator` must be a torch.Generator or several, got `{generator!r:.80}`"
        )
    if len(generators) not in (1, num_images):
        raise InputError(f"{len(generators)} generators for {num_images} images")
    # One image, encoded once: its sample is the first draw of the first generator.
    image_noise = None
    if request.image is not None:
        image_noise = pack(draw_noise_from(generators[:1], 1, *size))
    noise = draw_noise_from(generators, num_images // len(generators), *size)
    return pack(noise), image_noise


def _check_latents(latents: object, num_images: int) -> None:
    if (
        not isinstance(latents, torch.Tensor)
        or not latents.is_floating_point()
        or latents.ndim != 3
    ):
        raise InputError("`latents` must be a packed tensor (images, tokens, 64) of real numbers")
    if len(latents) != num_images:
        raise InputError(f"`latents` holds {len(latents)} rows for {num_images} images")


def _collect(done: list[Images]) -> Images:
    if isinstance(done[0], list):
        return [picture for pictures in done for picture in pictures]
    tensors = [torch.as_tensor(each) for each in done]
    return torch.cat(tensors) if isinstance(done[0], torch.Tensor) else torch.cat(tensors).numpy()
