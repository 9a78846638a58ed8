"""OpenAI's own Python client, unmodified, against a live server."""

import asyncio
import base64
import io
import time
from types import SimpleNamespace

import httpx2
import openai
import pytest
from asgi_client import KEY
from live_server import live_server
from PIL import Image
from server_fakes import FakeEngine, image_file, out_of_memory

from flux_nf4.server.jobs import QueueFullError


@pytest.fixture
def server():
    with live_server(api_keys=(KEY,)) as server:
        yield server


def client_of(server, key=KEY, **more):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, **more)


@pytest.fixture
def client(server):
    with client_of(server, max_retries=0) as client:
        yield client


def picture_of(image):
    return Image.open(io.BytesIO(base64.b64decode(image.b64_json)))


def test_images_are_generated(client):
    answer = client.images.generate(
        prompt="a cat", model="gpt-image-1", n=2, size="128x64", quality="low", output_format="webp"
    )

    assert [picture_of(image).size for image in answer.data] == [(128, 64)] * 2
    assert (answer.quality, answer.output_format, answer.size) == ("low", "webp", "128x64")
    assert answer.usage.output_tokens == 2 * 32


def test_extensions_go_in_and_come_out(client):
    answer = client.images.generate(
        prompt="a cat", extra_body={"seed": 7, "num_inference_steps": 3, "true_cfg_scale": 2.0}
    )

    assert answer.data[0].model_extra["seed"] == 7
    assert answer.model_extra["metadata"]["true_cfg_scale"] == 2.0


def test_a_stream_gives_partial_images_and_the_image(client):
    events = list(
        client.images.generate(prompt="a cat", stream=True, partial_images=3, quality="low")
    )

    assert [type(event).__name__ for event in events] == [
        *["ImageGenPartialImageEvent"] * 3,
        "ImageGenCompletedEvent",
    ]
    assert picture_of(events[-1]).size == (64, 64)


def test_a_link_can_be_followed_without_a_key(client):
    answer = client.images.generate(prompt="a cat", response_format="url")

    assert httpx2.get(answer.data[0].url).headers["content-type"] == "image/png"


def test_an_image_is_edited_where_the_mask_is_transparent(client):
    answer = client.images.edit(
        image=("cat.png", image_file(), "image/png"),
        mask=("mask.png", image_file(mode="RGBA", colour=(0, 0, 0, 0)), "image/png"),
        prompt="a dog",
        n=2,
        extra_body={"strength": 0.9},
    )

    assert len(answer.data) == 2


def test_a_list_of_one_image_is_edited(client):
    assert client.images.edit(image=[io.BytesIO(image_file())], prompt="a dog").data[0].b64_json


def test_an_edit_is_streamed(client):
    events = client.images.edit(
        image=io.BytesIO(image_file()), prompt="a dog", stream=True, partial_images=1
    )

    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


def test_a_model_that_is_not_there_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.models.retrieve("gpt-image-1")


def test_a_bad_request_has_message_code_param_and_request_id(client):
    with pytest.raises(openai.BadRequestError, match="the nearest is 1024x768") as caught:
        client.images.generate(prompt="a cat", size="1020x770")

    assert (caught.value.code, caught.value.param) == ("invalid_value", "size")
    assert caught.value.request_id


def test_a_wrong_key_is_an_authentication_error(server):
    with client_of(server, key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_failure_in_a_stream_is_an_api_error(server, client):
    server.engine.fail_next = out_of_memory()
    with pytest.raises(openai.APIError, match="out of memory") as caught:
        list(client.images.generate(prompt="a cat", stream=True))

    assert caught.value.code == "out_of_memory"


class FullEngine(FakeEngine):
    """Full for the first `num_refusals` requests."""

    def __init__(self, num_refusals):
        super().__init__()
        self.num_refusals, self.num_asked = num_refusals, 0

    def submit(self, spec, *, owner, api):
        self.num_asked += 1
        if self.num_asked <= self.num_refusals:
            raise QueueFullError("the queue is full", retry_after_s=0.01)
        return super().submit(spec, owner=owner, api=api)


@pytest.fixture
def no_waiting(monkeypatch):
    """The waits that the client makes between its attempts, which it then skips."""
    waits = []
    patient = SimpleNamespace(sleep=waits.append, time=time.time)
    monkeypatch.setattr("openai._base_client.time", patient)
    return waits


def test_a_full_queue_is_tried_again_as_the_server_says(no_waiting):
    engine = FullEngine(num_refusals=2)
    with live_server(engine) as server, client_of(server, key="none") as client:
        assert client.images.generate(prompt="a cat").data[0].b64_json

    assert engine.num_asked == 3
    assert no_waiting == [1, 1]


def test_a_queue_that_stays_full_is_a_rate_limit_error(no_waiting):
    engine = FullEngine(num_refusals=99)
    with (
        live_server(engine) as server,
        client_of(server, key="none") as client,
        pytest.raises(openai.RateLimitError, match="the queue is full"),
    ):
        client.images.generate(prompt="a cat")

    assert engine.num_asked == 3


def test_a_server_that_stops_is_not_tried_again(no_waiting):
    engine = FakeEngine()
    with live_server(engine) as server, client_of(server, key="none") as client:
        engine.is_draining = True
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            client.images.generate(prompt="a cat")

    assert no_waiting == []


def test_the_asynchronous_client_gets_images_and_streams(server):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            several = await asyncio.gather(
                *(
                    client.images.generate(prompt="a cat", extra_body={"seed": seed})
                    for seed in range(4)
                )
            )
            stream = await client.images.generate(prompt="a cat", stream=True, partial_images=1)
            return several, [event.type async for event in stream]

    several, types = asyncio.run(run())
    assert [answer.data[0].model_extra["seed"] for answer in several] == [0, 1, 2, 3]
    assert types == ["image_generation.partial_image", "image_generation.completed"]
