"""What clients of AUTOMATIC1111 and Forge send.

Of their fields only those stand here that mean something to FLUX, or whose loss is worth a
warning; all others are passed over. The clients are lax with types (`"512"`, 20.0, null), and so
is this; only `true` is no number.
Source: Forge, `modules/api/models.py`, and webuiapi 0.9.17.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
)


def _no_switch(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not a switch")  # noqa: TRY004  for pydantic
    return value


def _countable(value: int | None) -> int | None:
    if value is not None and abs(value) >= 2**64:
        raise ValueError("the number has more than 64 bits")
    return value


def _finite(value: object) -> object:
    json.dumps(value, allow_nan=False)  # else it could be read, and not be told back
    return value


Table = Annotated[dict[str, Any], AfterValidator(_finite)]
Whole = Annotated[
    int | None,
    BeforeValidator(_no_switch),
    AfterValidator(_countable),
    WithJsonSchema({"type": ["integer", "string", "null"]}),
]
Number = Annotated[
    float | None,
    BeforeValidator(_no_switch),
    WithJsonSchema({"type": ["number", "string", "null"]}),
]


class Body(BaseModel):
    """What all bodies here have in common."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class TextToImage(Body):
    """The body of `txt2img`; what is left out is the model's own."""

    prompt: str | None = Field(default=None, description="What to draw.")
    negative_prompt: str | None = Field(default=None, description="Needs true CFG.")
    width: Whole = Field(default=None, description="Rounded to a multiple of 16.")
    height: Whole = Field(default=None, description="Rounded to a multiple of 16.")
    steps: Whole = None
    cfg_scale: Number = Field(
        default=None, description="True CFG, where `distilled_cfg_scale` is given too."
    )
    distilled_cfg_scale: Number = Field(default=None, description="FLUX's own guidance.")
    seed: Whole = Field(default=None, description="-1: random, and told in `info`.")
    batch_size: Whole = None
    n_iter: Whole = None
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = Field(default=None, description="`Simple`: as Forge; else FLUX's own.")
    override_settings: Table | None = None
    lora: list[Any] | None = None
    send_images: Any = Field(default=None, description="False: no images in the answer.")
    # What changes an image elsewhere and nothing here, whatever its type.
    save_images: Any = None
    enable_hr: Any = None
    refiner_checkpoint: Any = None
    restore_faces: Any = None
    tiling: Any = None
    styles: Any = None
    subseed_strength: Any = None
    script_name: Any = None
    alwayson_scripts: Any = None


class ImageToImage(TextToImage):
    """The body of `img2img`."""

    init_images: list[str] | None = Field(default=None, description="One image, in base64.")
    mask: str | None = Field(default=None, description="In base64; white is drawn anew.")
    denoising_strength: Number = Field(default=None, description="0.75 unless given.")
    inpainting_mask_invert: Whole = Field(default=None, description="1: black is drawn anew.")
    resize_mode: Whole = None
    inpainting_fill: Whole = None
    mask_blur: Any = None
    inpaint_full_res: Any = None


class PngInfo(Body):
    """The body of `png-info`."""

    image: str = Field(description="PNG, JPEG or WebP in base64.")
