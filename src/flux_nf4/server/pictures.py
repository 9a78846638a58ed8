"""Images that come with requests and leave with answers, for every API alike."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING

from fastapi import Response

from flux_nf4.errors import InputError
from flux_nf4.server import images
from flux_nf4.server.problems import ApiError

if TYPE_CHECKING:
    from flux_nf4.server.context import Context
    from flux_nf4.server.jobs import Job

_PIECE = 2**20  # characters; four of them are three bytes


async def picture(
    job: Job, index: int, form: images.ImageFormat, quality: int | None = None
) -> Response:
    """A finished image of a job as an answer, never as anything but an image.

    Raises:
        ApiError: 404, the job has no such image, or not yet.
    """
    found = next((image for image in job.images if image.index == index), None)
    if found is None:
        raise ApiError(404, f"the job has no image {index}, or not yet", code="image_not_found")
    data = await asyncio.to_thread(images.transcode, found.png, form, quality)
    headers = {
        "cache-control": "private, max-age=3600, immutable",
        "content-disposition": f'inline; filename="{found.seed}.{form}"',
    }
    return Response(data, media_type=f"image/{form}", headers=headers)


async def check_upload(context: Context, name: str, data: bytes) -> images.UploadedImage:
    """An image file as it was sent, if it is one that is taken.

    Raises:
        InputError: it is not; the message begins with its field's name.
    """
    limit = context.settings.max_upload_pixels
    try:
        return await asyncio.to_thread(images.check_upload, data, max_pixels=limit)
    except InputError as error:
        raise InputError(f"`{name}`: {error.message}", hint=error.hint) from error


def _decode(text: str) -> bytes:
    """Piece by piece: no other thread runs while one of them is decoded."""
    pieces = (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))
    return b"".join(base64.b64decode(piece, validate=True) for piece in pieces)


async def decode_upload(context: Context, name: str, text: str) -> images.UploadedImage:
    """An image sent as base64, with or without `data:...,` before it, checked.

    Raises:
        InputError: it is not base64, or not an image that is taken.
    """
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    try:
        data = await asyncio.to_thread(_decode, encoded)
    except ValueError as error:
        raise InputError(f"`{name}` is not base64") from error
    return await check_upload(context, name, data)
