"""The API of AUTOMATIC1111 and Forge, as far as their clients use it.

Sources: Forge `modules/api/api.py`; the clients webuiapi 0.9.17, SillyTavern
`src/endpoints/stable-diffusion.js` and LibreChat `tools/structured/StableDiffusion.js`.
"""

from __future__ import annotations

import asyncio
import io
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body, Request, Response

from flux_nf4.pipeline.image_file import decode_image, to_eight_bits
from flux_nf4.server.context import Context, owner_of
from flux_nf4.server.pictures import decode_upload
from flux_nf4.server.problems import ApiError, Json
from flux_nf4.server.routing import Route
from flux_nf4.server.sdapi_answers import Callers, Watched, answer, image_info, progress
from flux_nf4.server.sdapi_mapping import Wish, to_wish
from flux_nf4.server.sdapi_options import (
    PICKERS,
    Options,
    checked,
    memory,
    models,
    output_format,
)
from flux_nf4.server.sdapi_schemas import ImageToImage, PngInfo, Table, TextToImage
from flux_nf4.server.security import LOCAL_OWNER

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from flux_nf4.server.jobs import Job

# Large, or of no effect and unchecked.
_NOT_TOLD = {"init_images", "mask", "lora"} | {
    name for name, field in ImageToImage.model_fields.items() if field.annotation is Any
}
_REFRESH = ("refresh-checkpoints", "refresh-vae", "refresh-loras", "refresh-embeddings")


def router(context: Context) -> APIRouter:
    """The routes under `/sdapi/v1`."""
    routes = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"], route_class=Route)
    options, callers = Options(), Callers()
    _add_drawing(routes, context, options, callers)
    _add_progress(routes, context, callers)
    _add_settings(routes, context, options)
    return routes


def _add_drawing(routes: APIRouter, context: Context, options: Options, callers: Callers) -> None:
    @routes.post("/txt2img")
    async def text_to_image(body: TextToImage, request: Request) -> Response:
        """Draw images and wait for them."""
        wish = to_wish(body, context.capabilities, context.settings.sdapi_cfg)
        return await _draw(context, options, callers, body, wish, request)

    @routes.post("/img2img")
    async def image_to_image(body: ImageToImage, request: Request) -> Response:
        """Draw images from an image; with a mask, only where that is white."""
        wish = to_wish(
            body,
            context.capabilities,
            context.settings.sdapi_cfg,
            **await _read_images(context, body),
        )
        return await _draw(context, options, callers, body, wish, request)

    @routes.post("/png-info")
    async def png_info(body: PngInfo) -> Response:
        """The settings that an image carries, its own and other tools'."""
        image = await decode_upload(context, "image", body.image)
        return Json(await asyncio.to_thread(image_info, image.data))


async def _draw(
    context: Context,
    options: Options,
    callers: Callers,
    body: TextToImage,
    wish: Wish,
    request: Request,
) -> Response:
    caller = caller_of(request)
    overrides, said = checked(context, body.override_settings or {})
    form, quality = output_format(options.read(context, caller) | overrides)
    job = context.submit(wish.spec, owner=owner_of(request), api="sdapi")
    async with callers.watching(caller, Watched(job)):
        await _finish(context, job, request)
    warnings = [*wish.warnings, *said, *job.notices]
    if len(job.images) < wish.spec.num_images:
        warnings.append("interrupted")
    told = await asyncio.to_thread(answer, context, job, form, quality, warnings)
    if body.send_images is False:
        told["images"] = []
    shown = body.model_dump(exclude=_NOT_TOLD, exclude_unset=True)
    return Json(told | {"parameters": shown})


async def _read_images(context: Context, body: ImageToImage) -> dict[str, Any]:
    if not body.init_images:
        raise ApiError(
            400,
            "`init_images` must hold an image",
            code="missing_required_parameter",
            param="init_images",
        )
    image = await decode_upload(context, "init_images", body.init_images[0])
    mask = (await decode_upload(context, "mask", body.mask)).data if body.mask else None
    if mask is not None and body.inpainting_mask_invert:
        mask = await asyncio.to_thread(_inverted, mask)
    return {"image": image, "mask_image": mask}


def _add_progress(routes: APIRouter, context: Context, callers: Callers) -> None:
    @routes.get("/progress")
    async def get_progress(request: Request, skip_current_image: bool = False) -> Response:
        """How far your own request has come; idle is 0.0 with a `job_count` of 0."""
        watched = callers.current(caller_of(request))
        return Json(progress(context, watched, with_image=not skip_current_image))

    async def interrupt(request: Request) -> Response:
        """Stop your own request at its next step; it answers with the images that it has."""
        watched = callers.current(caller_of(request))
        if watched is not None:
            context.engine.cancel(watched.job.id, cause="client")
        return Json({})

    routes.post("/interrupt")(interrupt)
    routes.post("/skip")(interrupt)


def _add_settings(routes: APIRouter, context: Context, options: Options) -> None:
    @routes.get("/options")
    async def get_options(request: Request) -> Response:
        """The options as they hold for you."""
        return Json(options.read(context, caller_of(request)))

    @routes.post("/options")
    async def set_options(request: Request, body: Annotated[Table, Body()]) -> Response:
        """Change options for yourself; the answer tells which have no effect."""
        return Json({"warnings": options.write(context, caller_of(request), body)})

    @routes.get("/sd-models")
    async def sd_models() -> Response:
        """The model, under every name that it is served under."""
        return Json(models(context))

    @routes.get("/cmd-flags")
    async def cmd_flags() -> Response:
        """What clients ask about how the server was started."""
        settings = context.settings
        return Json(
            {"api": True, "nowebui": False, "port": settings.port}
            | {"listen": not settings.is_loopback}
        )

    @routes.get("/memory")
    async def get_memory() -> Response:
        """Main memory of the server, in bytes."""
        return Json(memory())

    for name, value in PICKERS.items():
        routes.get(f"/{name}", name=name)(_telling(value))

    async def refresh() -> Response:
        """Nothing: there is nothing to look for anew."""
        return Json({})

    for name in _REFRESH:
        routes.post(f"/{name}", name=name)(refresh)


def _telling(value: Any) -> Callable[[], Coroutine[Any, Any, Response]]:
    async def tell() -> Response:
        """What there is to choose from, in the form that A1111 has for it."""
        return Json(value)

    return tell


def caller_of(request: Request) -> str:
    """Whose progress and options: the key's, or without keys those of an address."""
    owner = owner_of(request)
    if owner != LOCAL_OWNER or request.client is None:
        return owner
    return f"{owner} {request.client.host}"


async def _finish(context: Context, job: Job, request: Request) -> None:
    try:
        await context.finish(job, request)
    except ApiError:
        # Interrupted: what is finished was paid for, and is what A1111 answers with.
        if job.state != "cancelled" or not job.images:
            raise


def _inverted(mask: bytes) -> bytes:
    from PIL import ImageOps

    file = io.BytesIO()
    ImageOps.invert(to_eight_bits(decode_image(mask, "the mask")).convert("L")).save(file, "PNG")
    return file.getvalue()
