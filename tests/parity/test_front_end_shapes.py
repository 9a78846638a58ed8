"""What front ends send and read, request for request, against a live server with a fake engine.

Sources: Open WebUI `backend/open_webui/routers/images.py`, LibreChat
`api/app/clients/tools/structured/OpenAIImageTools.js`, SillyTavern
`src/endpoints/stable-diffusion.js`. Their A1111 requests are in `tests/unit/server/test_sdapi.py`.
"""

import base64
import io

import httpx2
import pytest
from asgi_client import KEY, bearer
from live_server import live_server
from PIL import Image
from server_fakes import image_file

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"

OPEN_WEBUI = {
    "model": "dall-e-3",
    "prompt": "a cat",
    "n": 1,
    "size": "512x512",
    "response_format": "b64_json",
}
# A model named like this gets no `response_format`.
OPEN_WEBUI_GPT = {"model": "gpt-image-1", "prompt": "a cat", "n": 2, "size": "auto"}
# Whatever stands in its setting IMAGES_OPENAI_API_PARAMS goes along.
OPEN_WEBUI_MORE = OPEN_WEBUI | {"num_inference_steps": 3, "seed": 7, "quality": "hd"}
OPEN_WEBUI_USER = {
    "X-OpenWebUI-User-Name": "Alice%20B",
    "X-OpenWebUI-User-Id": "1",
    "X-OpenWebUI-User-Email": "a%40b.example",
    "X-OpenWebUI-User-Role": "user",
}
LIBRECHAT = {
    "model": "gpt-image-1",
    "prompt": "a cat",
    "n": 1,
    "background": "auto",
    "output_format": "webp",
    "output_compression": 100,
    "quality": "auto",
    "size": "auto",
}
SILLYTAVERN_CPP = {
    "model": "demo",
    "prompt": "a cat",
    "negative_prompt": "a dog",
    "width": 512,
    "height": 512,
    "steps": 20,
    "cfg_scale": 7,
    "seed": 5,
    "batch_size": 1,
    "sampler_name": "euler_a",
    "scheduler": "discrete",
}


@pytest.fixture(scope="module")
def server():
    with live_server(api_keys=(KEY,)) as live:
        yield live


@pytest.fixture
def client(server):
    with httpx2.Client(base_url=server.url, headers=bearer(), timeout=30) as client:
        yield client


def pictures(answer):
    """The images as Open WebUI and LibreChat read them."""
    assert answer.status_code == 200, answer.text
    files = [base64.b64decode(each["b64_json"]) for each in answer.json()["data"]]
    return [Image.open(io.BytesIO(file)) for file in files]


@pytest.mark.parametrize(
    ("body", "form", "sizes"),
    [
        (OPEN_WEBUI, "PNG", [(512, 512)]),
        (OPEN_WEBUI_GPT, "PNG", [(64, 64)] * 2),
        (OPEN_WEBUI_MORE, "PNG", [(512, 512)]),
        (LIBRECHAT, "WEBP", [(64, 64)]),
    ],
    ids=["owui", "owui-gpt", "owui-more", "lc"],
)
def test_the_requests_of_front_ends_are_drawn(client, body, form, sizes):
    found = pictures(client.post(GENERATIONS, json=body, headers=OPEN_WEBUI_USER))

    assert [(picture.format, picture.size) for picture in found] == [(form, size) for size in sizes]


def test_open_webui_may_name_a_version_of_azures_api(client):
    assert pictures(client.post(f"{GENERATIONS}?api-version=2025-04-01-preview", json=OPEN_WEBUI))


def test_open_webui_follows_a_link_with_its_key_and_finds_an_image(client):
    answer = client.post(GENERATIONS, json=OPEN_WEBUI | {"response_format": "url"})
    file = client.get(answer.json()["data"][0]["url"])

    assert file.headers["content-type"].split("/")[0] == "image"


def test_open_webui_edits_one_image(client):
    fields = {"model": "gpt-image-1", "prompt": "a dog", "n": "1", "size": "512x512"}
    files = {"image": ("image.png", image_file(), "image/png")}

    assert pictures(client.post(EDITS, data=fields, files=files))[0].size == (512, 512)


def test_open_webui_edits_a_list_of_one_image(client):
    fields = {"model": "dall-e-2", "prompt": "a dog", "response_format": "b64_json"}
    files = {"image[]": ("image.png", image_file(), "image/png")}

    assert pictures(client.post(EDITS, data=fields, files=files))


def test_open_webui_shows_why_a_request_was_refused(client):
    answer = client.post(GENERATIONS, json=OPEN_WEBUI | {"size": "100x100"})

    # It shows no more than the reason phrase; the status must be one that has a telling one.
    assert (answer.status_code, answer.reason_phrase) == (400, "Bad Request")


def test_librechat_edits_an_image(client):
    fields = {"model": "gpt-image-1", "prompt": "a dog", "quality": "auto", "size": "auto"}
    files = {"image[]": ("a cat.jpg", image_file(form="JPEG"), "image/jpeg")}

    assert pictures(client.post(EDITS, data=fields, files=files))[0].size == (64, 64)


def test_librechat_is_told_that_backgrounds_are_never_transparent(client):
    answer = client.post(GENERATIONS, json=LIBRECHAT | {"background": "transparent"})

    assert answer.status_code == 400
    assert "`background`" in answer.json()["error"]["message"]


def test_sillytavern_finds_the_server_without_a_key():
    with live_server() as server:
        assert httpx2.options(f"{server.url}{GENERATIONS}").is_success


def test_sillytavern_lists_the_model(client):
    assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["demo"]


def test_sillytavern_draws_as_it_does_with_stable_diffusion_cpp(client):
    answer = client.post("/sdapi/v1/txt2img", json=SILLYTAVERN_CPP).json()
    picture = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))

    assert picture.size == (512, 512)
