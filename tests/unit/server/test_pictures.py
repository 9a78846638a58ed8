"""Images that come with requests, in base64."""

import asyncio
import base64
import io
import random

import pytest
from PIL import Image
from server_fakes import FakeEngine, image_file

from flux_nf4.errors import InputError
from flux_nf4.server.context import Context
from flux_nf4.server.pictures import decode_upload
from flux_nf4.server.settings import ServeSettings


def decoded(text):
    async def run():
        context = Context(settings=ServeSettings(), engine=FakeEngine())
        return (await decode_upload(context, "image", text)).data

    return asyncio.run(run())


def in_base64(data):
    return base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def large_file():
    """A picture of noise, whose base64 is decoded in several pieces."""
    noise = random.Random(0).randbytes(3 * 700 * 700)
    file = io.BytesIO()
    Image.frombytes("RGB", (700, 700), noise).save(file, "PNG")
    assert len(file.getvalue()) > 2**20
    return file.getvalue()


def test_a_large_image_comes_through_as_it_is(large_file):
    assert decoded(in_base64(large_file)) == large_file


def test_an_image_may_come_as_a_link_with_its_data():
    data = image_file()

    assert decoded(f"data:image/png;base64,{in_base64(data)}") == data


@pytest.mark.parametrize("place", [0, 2**20 + 1])
def test_what_is_not_base64_is_refused_wherever_it_is(large_file, place):
    text = in_base64(large_file)

    with pytest.raises(InputError, match="`image` is not base64"):
        decoded(f"{text[:place]}!{text[place + 1 :]}")
