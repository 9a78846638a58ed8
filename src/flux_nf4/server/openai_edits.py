"""The multipart body of `/v1/images/edits`: fields, one image, and OpenAI's kind of mask."""

from __future__ import annotations

import asyncio
import io
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from flux_nf4.errors import InputError
from flux_nf4.pipeline.image_file import decode_image
from flux_nf4.server.pictures import check_upload
from flux_nf4.server.problems import ApiError, from_validation
from flux_nf4.server.schemas import EditRequest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.requests import Request

    from flux_nf4.server.context import Context
    from flux_nf4.server.images import UploadedImage

_MAX_FILES, _MAX_FIELDS, _MAX_FIELD_BYTES = 20, 64, 200_000
_PIECE_BYTES = 2**16
_FILE = {"type": "string", "format": "binary"}


def _edit_schema() -> dict[str, Any]:
    schema = EditRequest.model_json_schema()
    files = {"image": _FILE, "image[]": {"type": "array", "items": _FILE}, "mask": _FILE}
    return schema | {"properties": files | schema["properties"]}


EDIT_BODY = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": {"schema": _edit_schema()}},
    }
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """An image to start from, and our kind of mask: white is drawn anew."""

    image: UploadedImage
    mask_image: bytes | None


async def read_edit(context: Context, request: Request) -> tuple[EditRequest, Upload]:
    """What an edit asks for.

    Raises:
        ApiError: the body is not multipart, or a field is wrong.
        InputError: there is not exactly one image, or an image is not one that is taken.
    """
    fields, files = await _read_form(context, request)
    found = [*files.pop("image", []), *files.pop("image[]", [])]
    masks = files.pop("mask", [])
    for name in files:
        raise ApiError(400, f"unknown file `{name}`", code="unknown_parameter", param=name)
    if not found:
        raise ApiError(400, "`image` is missing", code="missing_required_parameter", param="image")
    if len(found) > 1 or len(masks) > 1:
        name = "image" if len(found) > 1 else "mask"
        raise ApiError(400, f"this model takes one `{name}`", code="unsupported_value", param=name)
    try:
        body = EditRequest.model_validate_strings(fields, strict=False)
    except ValidationError as error:
        raise from_validation(error.errors()) from error
    image = await check_upload(context, "image", found[0])
    mask = None
    if masks:
        await check_upload(context, "mask", masks[0])
        mask = await asyncio.to_thread(
            _white_where_transparent, masks[0], image.width, image.height
        )
    return body, Upload(image=image, mask_image=mask)


async def _read_form(
    context: Context, request: Request
) -> tuple[dict[str, str], dict[str, list[bytes]]]:
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "the request has no body", code="missing_required_parameter")
    async with aclosing(_pieces(request)) as pieces:
        parser = MultiPartParser(
            request.headers,
            pieces,
            max_files=_MAX_FILES,
            max_fields=_MAX_FIELDS,
            max_part_size=_MAX_FIELD_BYTES,
        )
        # The body is in memory already: nothing of it goes to the disk.
        parser.spool_max_size = context.settings.max_upload_bytes
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise ApiError(400, error.message.rstrip("."), code="invalid_multipart") from error
    fields: dict[str, str] = {}
    files: dict[str, list[bytes]] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            files.setdefault(name, []).append(await value.read())
        else:
            fields[name] = value
    await form.close()
    return fields, files


async def _pieces(request: Request) -> AsyncGenerator[bytes]:
    """The body bit by bit: its parser is Python, and others want their turn."""
    body = memoryview(await request.body())
    for start in range(0, len(body), _PIECE_BYTES):
        yield bytes(body[start : start + _PIECE_BYTES])
        await asyncio.sleep(0)


def _white_where_transparent(data: bytes, width: int, height: int) -> bytes:
    """OpenAI's mask (transparent: drawn anew) as ours (white: drawn anew).

    Raises:
        InputError: nothing of it is transparent, or it is not as large as the image.
    """
    from PIL import ImageChops

    mask = decode_image(data, "the mask")
    if mask.size != (width, height):
        raise InputError(
            f"`mask` is {mask.width} x {mask.height} pixels and `image` {width} x {height}",
            hint="both must have the same size",
        )
    alpha = mask.convert("RGBA").getchannel("A")
    if alpha.getextrema()[0] == 255:
        raise InputError(
            "`mask` has no transparent pixels",
            hint="what is transparent is drawn anew; `/v1/jobs` takes masks in black and white",
        )
    file = io.BytesIO()
    ImageChops.invert(alpha).save(file, "PNG")
    return file.getvalue()
