"""The real `webuiapi` client, unmodified, against the real application."""

import pytest
import webuiapi
from live_server import live_server
from PIL import Image
from server_fakes import fake_capabilities


@pytest.fixture(scope="module")
def server():
    with live_server() as live:
        yield live


@pytest.fixture
def client(server):
    with webuiapi.WebUIApi(port=server.port, sampler="Euler", scheduler="Simple") as api:
        yield api


@pytest.fixture(autouse=True)
def _closed(monkeypatch):
    """The client has no `close`: its session is closed when it is left."""
    monkeypatch.setattr(webuiapi.WebUIApi, "__enter__", lambda self: self, raising=False)
    monkeypatch.setattr(
        webuiapi.WebUIApi, "__exit__", lambda self, *_: self.session.close(), raising=False
    )


def test_an_image_comes_with_its_seed(client):
    result = client.txt2img(prompt="a cat", seed=7, steps=2, width=64, height=64)

    assert result.image.size == (64, 64)
    assert result.info["seed"] == 7
    assert result.image.info["parameters"] == result.info["infotexts"][0]


def test_several_images_come_in_the_order_of_their_seeds(client):
    result = client.txt2img(prompt="a cat", seed=7, steps=1, width=64, height=64, n_iter=3)

    assert len(result.images) == 3
    assert result.info["all_seeds"] == [7, 8, 9]


def test_an_image_is_drawn_from_an_image_with_a_mask(client):
    picture, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 255)
    result = client.img2img(
        images=[picture], mask_image=mask, prompt="a", seed=1, steps=2, width=64, height=64
    )

    assert result.info["denoising_strength"] == 0.75
    assert result.image.size == (64, 64)


def test_settings_are_read_from_an_image(client):
    result = client.txt2img(prompt="a cat", seed=7, steps=1, width=64, height=64)

    assert client.png_info(result.image).info == result.info["infotexts"][0]


def test_the_model_can_be_set_to_what_it_is(client, capsys):
    client.util_set_model(fake_capabilities().model)

    assert client.util_get_current_model() == fake_capabilities().model


def test_an_idle_server_is_ready_at_once(client, capsys):
    client.util_wait_for_ready(check_interval=0.01)

    assert "[WAIT]" not in capsys.readouterr().out


def test_every_picker_of_the_client_is_answered(client):
    assert client.util_get_sampler_names() == ["Euler"]
    assert client.util_get_scheduler_names() == ["automatic", "simple"]
    assert client.util_get_model_names() == [fake_capabilities().model]
    for ask in (
        client.get_upscalers,
        client.get_latent_upscale_modes,
        client.get_loras,
        client.get_sd_vae,
        client.get_hypernetworks,
        client.get_face_restorers,
        client.get_realesrgan_models,
        client.get_prompt_styles,
    ):
        assert isinstance(ask(), list)
    for ask in (client.get_cmd_flags, client.get_memory, client.get_embeddings, client.get_scripts):
        assert isinstance(ask(), dict)


def test_interrupt_skip_and_refresh_are_answered(client):
    assert [client.interrupt(), client.skip(), client.refresh_checkpoints()] == [{}, {}, {}]


def test_options_are_set_and_read_back(client):
    client.set_options({"samples_format": "webp"})
    try:
        assert client.get_options()["samples_format"] == "webp"
        assert client.txt2img(prompt="a", steps=1, width=64, height=64).image.format == "WEBP"
    finally:
        client.set_options({"samples_format": "png"})


def test_an_error_says_what_is_wrong(client):
    with pytest.raises(RuntimeError, match="`steps`"):
        client.txt2img(prompt="a", steps=5000)


def test_a_key_goes_as_the_password(server):
    key = "k" * 20
    with (
        live_server(api_keys=(key,)) as live,
        webuiapi.WebUIApi(port=live.port, username="me", password=key) as client,
        webuiapi.WebUIApi(port=live.port, username="me", password="wrong") as stranger,
    ):
        assert client.txt2img(prompt="a", steps=1, width=64, height=64).image.size == (64, 64)
        with pytest.raises(RuntimeError, match="401"):
            stranger.txt2img(prompt="a")
