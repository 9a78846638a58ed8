"""What is asked of a pipeline: one prompt, and everything that decides its images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from flux_nf4.errors import InputError
from flux_nf4.pipeline.image_file import check_mask
from flux_nf4.pipeline.limits import (
    DEFAULT_DISTILLED_GUIDANCE,
    DEFAULT_STRENGTH,
    MAX_SEED,
    MAX_STEPS,
    ScheduleKind,
    check_size,
)

if TYPE_CHECKING:
    from PIL.Image import Image

# Far beyond what the text encoders read (512 tokens), and short enough to tokenize at once.
MAX_PROMPT_CHARACTERS = 100_000
MAX_IMAGES = 10_000
MAX_BATCH_SIZE = 64
MAX_GUIDANCE_SCALE = 100.0


def check_whole_number(name: str, value: object, low: int, high: int) -> None:
    """Accept an `int` from `low` to `high`.

    Raises:
        InputError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"`{name}` must be a whole number from {low} to {high}, got `{value!r}`")


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Accept a number from `low` to `high`.

    Raises:
        InputError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"`{name}` must be a number from {low:g} to {high:g}, got `{value!r}`")


def check_prompt(name: str, value: object) -> None:
    """Accept a text that the tokenizers can read.

    Raises:
        InputError: it is not a text, too long, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise InputError(f"`{name}` must be a text, got `{type(value).__name__}`")
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise InputError(
            f"`{name}` has {len(value)} characters, more than {MAX_PROMPT_CHARACTERS}",
            hint="the model reads a few hundred words at most",
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"`{name}` is not valid Unicode: {error.reason}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt's images.

    `guidance_scale` is true classifier-free guidance: 1 is one pass a step with the negative
    prompt unused, more is two passes. `distilled_guidance_scale` feeds the guidance embedding of
    FLUX.1-dev. Image `i` has the seed `seed + i`, so that it can be repeated alone. Sizes are in
    pixels. `max_sequence_length` limits T5's tokens; None takes the model's own.

    With an `image`, the drawing starts from it: it is scaled and cropped to the size, and only the
    last `strength` of the steps is run, on the image with as much noise as the first of them
    expects. At 1 nothing of the image is left. Where there is a `mask_image`, only its white is
    drawn anew, and every other pixel stays as it is. `num_previews` of an image are spread over
    its steps, the last one after the last step.

    Raises:
        InputError: a value is out of range, with the nearest legal sizes for a size.
    """

    prompt: str
    negative_prompt: str = ""
    width: int
    height: int
    num_inference_steps: int = 20
    distilled_guidance_scale: float = DEFAULT_DISTILLED_GUIDANCE
    guidance_scale: float = 1.0
    seed: int = 0
    num_images: int = 1
    batch_size: int = 1
    max_sequence_length: int | None = None
    schedule: ScheduleKind = "flux"
    image: Image | None = None
    mask_image: Image | None = None
    strength: float = DEFAULT_STRENGTH
    num_previews: int = 0

    def __post_init__(self) -> None:
        check_prompt("prompt", self.prompt)
        check_prompt("negative_prompt", self.negative_prompt)
        check_size(self.width, self.height)
        check_whole_number("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        check_number(
            "distilled_guidance_scale", self.distilled_guidance_scale, 0, MAX_GUIDANCE_SCALE
        )
        check_number("guidance_scale", self.guidance_scale, 1, MAX_GUIDANCE_SCALE)
        check_whole_number("num_images", self.num_images, 1, MAX_IMAGES)
        check_whole_number("batch_size", self.batch_size, 1, MAX_BATCH_SIZE)
        check_whole_number("seed", self.seed, 0, MAX_SEED)
        if self.seed + self.num_images - 1 > MAX_SEED:
            raise InputError(f"`seed` {self.seed} leaves no seeds for {self.num_images} images")
        if self.max_sequence_length is not None:
            # 512 is what FLUX.1-dev was trained with; attention pays for every token.
            check_whole_number("max_sequence_length", self.max_sequence_length, 2, 512)
        if self.schedule not in get_args(ScheduleKind):
            names = " or ".join(f"`{name}`" for name in get_args(ScheduleKind))
            raise InputError(f"`schedule` must be {names}, got `{self.schedule!r}`")
        check_whole_number("num_previews", self.num_previews, 0, MAX_STEPS)
        self._check_image()

    def _check_image(self) -> None:
        check_number("strength", self.strength, 0, 1)
        if not self.strength:
            raise InputError("`strength` must be more than 0: at 0 the image stays as it is")
        if self.image is None:
            if self.mask_image is not None:
                raise InputError("`mask_image` needs an `image`", hint="give both, or neither")
            return
        from PIL.Image import Image

        for name, value in (("image", self.image), ("mask_image", self.mask_image)):
            if value is not None and not isinstance(value, Image):
                kind = type(value).__name__
                raise InputError(f"`{name}` must be a PIL.Image.Image, got `{kind}`")
            if value is not None and 0 in value.size:
                raise InputError(f"`{name}` of {value.width} x {value.height} has no pixels")
        if self.mask_image is not None:
            check_mask(self.mask_image, self.image)

    @property
    def num_steps(self) -> int:
        """The steps that are run: with an image, `strength` of them, rounded up (so at least one).

        The rounding is that of Diffusers, errors of floating point included.
        """
        if self.image is None:
            return self.num_inference_steps
        num_skipped = int(self.num_inference_steps - self.num_inference_steps * self.strength)
        return max(1, self.num_inference_steps - num_skipped)

    @property
    def is_guided(self) -> bool:
        """Whether each step takes a second pass, for the negative prompt."""
        return self.guidance_scale > 1

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed an image."""
        return tuple(range(self.seed, self.seed + self.num_images))
