"""From a request in A1111's words to a job: what is taken, what is rounded, what is told.

A1111's clients send what their users once set for other models. What would spoil a FLUX image is
left out, and every such case is told in `info.warnings`; nothing is refused that can be drawn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flux_nf4.errors import InputError
from flux_nf4.pipeline.limits import MAX_SIZE, MIN_SIZE, PIXELS_PER_TOKEN
from flux_nf4.server.context import random_seed
from flux_nf4.server.jobs import JobSpec
from flux_nf4.server.problems import NO_LORA, ApiError
from flux_nf4.server.sdapi_schemas import ImageToImage, TextToImage
from flux_nf4.server.settings import MAX_IMAGES_PER_REQUEST

if TYPE_CHECKING:
    from flux_nf4.server.images import UploadedImage
    from flux_nf4.server.settings import SdapiCfg
    from flux_nf4.server.status import Capabilities

NUM_PREVIEWS = 5
_DEFAULT_STRENGTH = 0.75
_LORA = re.compile(r"<\s*(?:lora|lyco|hypernet)\s*:", re.IGNORECASE)
_EULER = ("euler", "k_euler", "[forge] flux realistic", "none", "")
_OWN_SCHEDULERS = ("automatic", "flux", "use same scheduler", "none", "")
_WITHOUT_EFFECT = {
    "enable_hr": "`enable_hr`: there is no second pass at a higher resolution",
    "refiner_checkpoint": "`refiner_checkpoint`: there is no refiner",
    "restore_faces": "`restore_faces` has no effect",
    "tiling": "`tiling` has no effect",
    "styles": "`styles`: this server has none",
    "subseed_strength": "`subseed_strength` has no effect",
    "save_images": "`save_images`: this server stores no images",
}
_WITHOUT_EFFECT_ON_MASKS = {
    "mask_blur": "`mask_blur`: the mask's edge stays sharp",
    "inpaint_full_res": "`inpaint_full_res`: the whole image is drawn, not the masked part alone",
}
_FILL_WITH_ORIGINAL = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A request, understood; `warnings` tell what was done otherwise than asked."""

    spec: JobSpec
    warnings: list[str] = field(default_factory=list)


def to_wish(
    body: TextToImage,
    model: Capabilities,
    cfg: SdapiCfg,
    *,
    image: UploadedImage | None = None,
    mask_image: bytes | None = None,
) -> Wish:
    """What a request means for this model; the images are those of `body`, checked.

    Raises:
        ApiError: 400, it asks for a LoRA.
        InputError: a value is out of range; the message begins with A1111's name of the field.
    """
    _refuse_lora(body)
    warnings = [
        said for name, said in _WITHOUT_EFFECT.items() if getattr(body, name, None)
    ] + _scripts(body)
    distilled, true_cfg = _guidance(body, model, cfg, warnings)
    schedule = _schedule(body, warnings)
    values: dict[str, Any] = {
        "prompt": body.prompt or "",
        "negative_prompt": body.negative_prompt or "",
        "width": _side("width", body.width, model.default_width, warnings),
        "height": _side("height", body.height, model.default_height, warnings),
        "num_inference_steps": model.default_steps if body.steps is None else body.steps,
        "distilled_guidance_scale": distilled,
        "guidance_scale": true_cfg,
        "seed": random_seed() if body.seed is None or body.seed < 0 else body.seed,
        "num_images": _num_images(body, warnings),
        "schedule": schedule,
        "num_previews": NUM_PREVIEWS,
    }
    if isinstance(body, ImageToImage) and image is not None:
        strength = body.denoising_strength
        values["strength"] = _DEFAULT_STRENGTH if strength is None else strength
        values |= {"image": image.data, "mask_image": mask_image}
        _tell_of_images(body, image, values, warnings)
    if body.negative_prompt and true_cfg <= 1:
        warnings.append("`negative_prompt` has no effect without true CFG (`cfg_scale` above 1)")
    try:
        return Wish(spec=JobSpec(**values), warnings=warnings)
    except InputError as error:
        raise InputError(_in_their_words(error.message), hint=error.hint) from error


def _refuse_lora(body: TextToImage) -> None:
    for name in ("prompt", "negative_prompt"):
        if _LORA.search(getattr(body, name) or ""):
            raise ApiError(400, NO_LORA, code="unsupported_value", param=name)
    if body.lora:
        raise ApiError(400, NO_LORA, code="unsupported_value", param="lora")


def _scripts(body: TextToImage) -> list[str]:
    names = [str(body.script_name)] if body.script_name else []
    scripts = body.alwayson_scripts
    for name, script in scripts.items() if isinstance(scripts, dict) else ():
        arguments = script.get("args") if isinstance(script, dict) else script
        # `[]` and `[False]` are how clients say that a script shall not run.
        if arguments and arguments != [False]:
            names.append(name)
    return [f"the script `{name[:60]}` is not here: it was left out" for name in names]


def _guidance(
    body: TextToImage, model: Capabilities, cfg: SdapiCfg, warnings: list[str]
) -> tuple[float, float]:
    """FLUX's own guidance and true CFG.

    Clients that do not know of FLUX send a `cfg_scale` of 4 to 7. Taken as true CFG that is twice
    the time and a burnt image, so by default it counts only beside a `distilled_cfg_scale`.
    """
    default: float = JobSpec.__dataclass_fields__["distilled_guidance_scale"].default  # type: ignore[assignment]
    distilled = default if body.distilled_cfg_scale is None else body.distilled_cfg_scale
    if body.distilled_cfg_scale is not None and not model.embeds_guidance:
        warnings.append("`distilled_cfg_scale` has no effect on this model")
    scale = body.cfg_scale
    if scale is None:
        return distilled, 1.0
    if cfg == "guidance":
        return (scale if body.distilled_cfg_scale is None else distilled), 1.0
    is_meant = cfg == "true" or (cfg == "auto" and body.distilled_cfg_scale is not None)
    if is_meant:
        return distilled, max(1.0, scale)
    if scale > 1:
        warnings.append(
            f"`cfg_scale` {scale:g} is ignored"
            + (": send `distilled_cfg_scale` too to use true CFG" if cfg == "auto" else "")
        )
    return distilled, 1.0


def _schedule(body: TextToImage, warnings: list[str]) -> str:
    sampler = body.sampler_name or body.sampler_index or ""
    if sampler.lower() not in _EULER:
        warnings.append(f"the sampler is Euler, not `{sampler[:60]}`")
    scheduler = body.scheduler or ""
    if scheduler.lower() in ("simple", "forge"):
        return "forge"
    if scheduler.lower() not in _OWN_SCHEDULERS:
        warnings.append(f"the schedule is FLUX's own, not `{scheduler[:60]}`")
    return "flux"


def _side(name: str, size: int | None, default: int, warnings: list[str]) -> int:
    if size is None:
        return default
    nearest = (size + PIXELS_PER_TOKEN // 2) // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN
    if size != nearest and MIN_SIZE <= size <= MAX_SIZE:
        warnings.append(f"`{name}` {size} is drawn as {nearest}, a multiple of {PIXELS_PER_TOKEN}")
        return nearest
    return size


def _num_images(body: TextToImage, warnings: list[str]) -> int:
    sizes = (body.batch_size, body.n_iter)
    for name, value in zip(("batch_size", "n_iter"), sizes, strict=True):
        if value is not None and value < 1:
            raise InputError(f"`{name}` must be at least 1, got `{value}`")
    wanted = (body.batch_size or 1) * (body.n_iter or 1)
    if wanted > MAX_IMAGES_PER_REQUEST:
        warnings.append(
            f"`batch_size` times `n_iter` is {wanted}; one request draws at most "
            f"{MAX_IMAGES_PER_REQUEST} images"
        )
    return min(wanted, MAX_IMAGES_PER_REQUEST)


def _tell_of_images(
    body: ImageToImage, image: UploadedImage, values: dict[str, Any], warnings: list[str]
) -> None:
    if len(body.init_images or ()) > 1:
        warnings.append("`init_images`: only the first is used")
    has_other_shape = image.width * values["height"] != image.height * values["width"]
    if has_other_shape and body.resize_mode != 1:
        warnings.append("`resize_mode`: the image is scaled to cover the size, and cropped")
    if body.mask:
        warnings += [said for name, said in _WITHOUT_EFFECT_ON_MASKS.items() if getattr(body, name)]
        if body.inpainting_fill not in (None, _FILL_WITH_ORIGINAL):
            warnings.append("`inpainting_fill`: what is drawn anew begins as the image itself")


def _in_their_words(message: str) -> str:
    """Our message with A1111's name of the field, so that a client's user knows it."""
    names = {
        "num_inference_steps": "steps",
        "distilled_guidance_scale": "distilled_cfg_scale",
        "guidance_scale": "cfg_scale",
        "strength": "denoising_strength",
        "num_images": "batch_size",
        "image": "init_images",
        "mask_image": "mask",
    }
    return re.sub(r"`(\w+)`", lambda found: f"`{names.get(found[1], found[1])}`", message)
