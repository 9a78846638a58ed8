"""What this server can do, and what an image tells of its making: for the page and for programs."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from flux_nf4 import __version__
from flux_nf4.pipeline.image_metadata import read_image
from flux_nf4.pipeline.limits import MAX_SIZE, MAX_STEPS, MIN_SIZE, PIXELS_PER_TOKEN
from flux_nf4.server.jobs import JobSpec
from flux_nf4.server.memory import may_be_set
from flux_nf4.server.problems import Json
from flux_nf4.server.settings import MAX_IMAGES_PER_REQUEST, QUALITY_STEPS

if TYPE_CHECKING:
    from flux_nf4.server.context import Context

# Name, and the sides' relation.
_SHAPES = (
    ("square", 1, 1),
    ("portrait", 3, 4),
    ("tall", 9, 16),
    ("landscape", 4, 3),
    ("wide", 16, 9),
)
_RAW_IMAGE = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in ("image/png", "image/jpeg", "image/webp", "application/octet-stream")
        },
    }
}


def router(context: Context) -> APIRouter:
    """`/v1/capabilities` and `/v1/image-info`."""
    routes = APIRouter(tags=["Native"])

    @routes.get("/v1/capabilities")
    async def get_capabilities() -> Response:
        """The model, its defaults, and how much a request may ask for."""
        return Json(_capabilities(context))

    @routes.post("/v1/image-info", openapi_extra=_RAW_IMAGE)
    async def image_info(request: Request) -> Response:
        """The settings that an image carries; the body is its file."""
        return Json(await asyncio.to_thread(_image_info, await request.body()))

    return routes


def _capabilities(context: Context) -> dict[str, Any]:
    model, settings = context.capabilities, context.settings
    return {
        "model": {
            "name": context.model_names[0],
            "variant": model.variant,
            "quantization": model.quantization,
            "licence": model.licence,
            "is_demo": model.is_demo,
            "device": model.device,
            "dtype": model.dtype,
        },
        "defaults": {
            "width": model.default_width,
            "height": model.default_height,
            "num_inference_steps": model.default_steps,
            **{
                name: JobSpec.__dataclass_fields__[name].default
                for name in ("distilled_guidance_scale", "guidance_scale", "strength")
            },
        },
        "limits": {
            "min_size": MIN_SIZE,
            "max_size": MAX_SIZE,
            "size_step": PIXELS_PER_TOKEN,
            "max_pixels": settings.max_pixels,
            "max_steps": MAX_STEPS,
            "max_images": MAX_IMAGES_PER_REQUEST,
            "max_queue": context.engine.settings.max_queue,
            "max_upload_bytes": settings.max_upload_bytes,
            "max_upload_pixels": settings.max_upload_pixels,
            "max_megapixel_steps": settings.max_megapixel_steps,
        },
        "presets": _presets(model.default_steps),
        "sizes": _sizes(model.default_width, model.default_height),
        "features": {
            "distilled_guidance": model.embeds_guidance,
            "image_to_image": True,
            "inpainting": True,
            "lora": False,
            "previews": True,
            "durable": context.engine.settings.journal is not None,
            "memory_setting": may_be_set(context),
        },
        "memory": model.memory,
        "version": __version__,
    }


def _presets(default_steps: int) -> list[dict[str, Any]]:
    """One for each quality; one alone where more steps than the model's own gain nothing."""
    is_quick = default_steps < min(QUALITY_STEPS.values())
    steps = {"auto": default_steps} if is_quick else QUALITY_STEPS
    return [{"name": name, "num_inference_steps": number} for name, number in steps.items()]


def _sizes(width: int, height: int) -> list[dict[str, Any]]:
    """Shapes with about as many pixels as the model's own size."""
    sizes = []
    for name, across, down in _SHAPES:
        area = width * height / (across * down)
        unit = max(area**0.5, MIN_SIZE / min(across, down))
        sides = [
            round(unit * side / PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN for side in (across, down)
        ]
        sizes.append({"name": name, "width": sides[0], "height": sides[1]})
    return sizes


def _image_info(data: bytes) -> dict[str, Any]:
    record = read_image(data)
    return {
        "width": record.width,
        "height": record.height,
        "settings": None if record.settings is None else dataclasses.asdict(record.settings),
        "parameters": record.parameters,
        "pairs": dict(record.pairs),
    }
