"""The bodies of requests, for checking and for the API's description.

Types are strict: `true` is no number and `"4"` is none either. Ranges that `JobSpec` holds to
stand here only for the description: it says better what would do instead.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from flux_nf4.pipeline.limits import (
    MAX_SIZE,
    MAX_STEPS,
    MIN_SIZE,
    PIXELS_PER_TOKEN,
    ScheduleKind,
)
from flux_nf4.pipeline.request import MAX_GUIDANCE_SCALE, MAX_PROMPT_CHARACTERS
from flux_nf4.server.settings import MAX_IMAGES_PER_REQUEST

Quality: TypeAlias = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]
MAX_OPENAI_PROMPT_CHARACTERS = 32_000
_SIDE = {"minimum": MIN_SIZE, "maximum": MAX_SIZE, "multipleOf": PIXELS_PER_TOKEN}
_GUIDANCE = {"minimum": 0, "maximum": MAX_GUIDANCE_SCALE}
_TRUE_GUIDANCE = {"minimum": 1, "maximum": MAX_GUIDANCE_SCALE}
_STEPS = {"minimum": 1, "maximum": MAX_STEPS}
# The largest below the pipeline's limit that programs whose numbers are doubles take as it is.
_LARGEST_SEED = 2**64 - 2**11


def described(text: str, **schema: Any) -> Any:
    """A field that is null unless given, with `schema` for its description only."""
    return Field(default=None, description=text, json_schema_extra=schema or None)


class Body(BaseModel):
    """What all bodies have in common."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class JobRequest(Body):
    """Everything that decides a job's images; what is left out is the model's own."""

    prompt: str = Field(json_schema_extra={"maxLength": MAX_PROMPT_CHARACTERS})
    negative_prompt: str | None = described(
        "What to keep out; needs `guidance_scale` above 1.", maxLength=MAX_PROMPT_CHARACTERS
    )
    width: int | None = described("Pixels.", **_SIDE)
    height: int | None = described("Pixels.", **_SIDE)
    num_inference_steps: int | None = described("Denoising steps.", **_STEPS)
    distilled_guidance_scale: float | None = described(
        "How closely to follow the prompt, at no cost.", **_GUIDANCE
    )
    guidance_scale: float | None = described(
        "True guidance; above 1 takes twice the time.", **_TRUE_GUIDANCE
    )
    seed: int | None = described("Null: random, and told.", minimum=0, maximum=_LARGEST_SEED)
    num_images: int | None = Field(
        default=None, ge=1, le=MAX_IMAGES_PER_REQUEST, description="With seeds counting up."
    )
    schedule: ScheduleKind | None = described("Steps spaced by image size, or as Forge does.")
    image: str | None = described("PNG, JPEG or WebP in base64: what to start from.")
    mask_image: str | None = described("In base64; white is drawn anew. Needs `image`.")
    strength: float | None = described(
        "How much of `image` is replaced.", exclusiveMinimum=0, maximum=1
    )
    num_previews: int | None = described("Previews of each image.", minimum=0, maximum=MAX_STEPS)
    lora: None = described("Not supported: this version serves no LoRA adapters.")


class ImageRequest(Body):
    """`POST /v1/images/generations` as OpenAI has it, and what this server adds.

    Additions: `seed`, `num_inference_steps`, `guidance_scale`, `true_cfg_scale`,
    `negative_prompt`, `width` and `height` (clients send them by `extra_body`).
    """

    prompt: str = Field(
        max_length=MAX_OPENAI_PROMPT_CHARACTERS, json_schema_extra={"pattern": r"\S"}
    )
    model: str | None = described("Any name is taken, unless the server is strict about it.")
    n: int | None = Field(
        default=None, ge=1, le=MAX_IMAGES_PER_REQUEST, description="With seeds counting up."
    )
    size: str | None = described(
        "`auto` or `WIDTHxHEIGHT`: multiples of 16, from 1:3 to 3:1.",
        pattern=r"^(auto|[0-9]{2,4}x[0-9]{2,4})$",
    )
    quality: Quality | None = described("In steps: 10, 20, 28, 40, 50.")
    background: Literal["opaque", "auto"] | None = described("Images have no transparency.")
    output_format: Literal["png", "jpeg", "webp"] | None = described("The image's format.")
    output_compression: int | None = Field(
        default=None, ge=0, le=100, description="The quality of a JPEG or WebP."
    )
    response_format: Literal["b64_json", "url"] | None = described("A link ends after an hour.")
    stream: bool | None = described("Send events.")
    partial_images: int | None = Field(
        default=None, ge=0, le=3, description="Previews of each image while it is drawn."
    )
    user: str | None = described("Given back as `safety_identifier`; kept nowhere.")
    safety_identifier: str | None = described("Given back; kept nowhere.")
    moderation: Literal["low", "auto"] | None = described("Without effect: nothing is filtered.")
    style: Literal["vivid", "natural"] | None = described("Without effect.")
    complexity: Literal["low", "medium", "high"] | None = described("Without effect.")
    svg: None = described("Not supported.")
    frame_count: None = described("Not supported.")
    frame_duration_ms: None = described("Not supported.")
    seed: int | None = described("Null or -1: random, and told.", minimum=-1, maximum=_LARGEST_SEED)
    num_inference_steps: int | None = described("In place of `quality`.", **_STEPS)
    guidance_scale: float | None = described(
        "Distilled guidance: how closely to follow the prompt, at no cost.", **_GUIDANCE
    )
    true_cfg_scale: float | None = described(
        "True guidance; above 1 takes twice the time.", **_TRUE_GUIDANCE
    )
    negative_prompt: str | None = described("What to keep out; needs `true_cfg_scale` above 1.")
    width: int | None = described("In place of `size`, with `height`.", **_SIDE)
    height: int | None = described("In place of `size`, with `width`.", **_SIDE)
    lora: None = described("Not supported: this version serves no LoRA adapters.")


class EditRequest(ImageRequest):
    """The fields of `POST /v1/images/edits` beside its files."""

    strength: float | None = described(
        "How much of the image is replaced.", exclusiveMinimum=0, maximum=1
    )
    input_fidelity: Literal["high", "low"] | None = described("Without effect; see `strength`.")


class MemoryRequest(Body):
    """How much of the device's memory the workers may take."""

    vram: str | None = Field(
        description="`6GB`, `6144MB`, ...; `auto` or null: what was free when the worker started.",
        json_schema_extra={"pattern": r"^(auto|[1-9][0-9]{0,5} ?[MGT]i?B)$"},
    )


class Fault(BaseModel):
    """What went wrong: for a person, and (`type`, `code`) for a program."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer that is not what was asked for, in OpenAI's shape."""

    error: Fault
