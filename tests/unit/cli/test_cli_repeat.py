"""`generate --from IMAGE`."""

import dataclasses

import image_settings
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flux_nf4.pipeline.image_metadata import read_image, save_image
from flux_nf4.server.images import encode_png, transcode

SETTINGS = dataclasses.replace(image_settings.SETTINGS, width=80, height=96)
FORGE = (
    "a dog\nNegative prompt: rain\n"
    "Steps: 9, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 2.5, "
    "Seed: 5, Size: 80x96, Model: flux1-dev-bnb-nf4-v2"
)
SDXL = "a dog\nSteps: 9, Sampler: DPM++ 2M, CFG scale: 7, Seed: 5, Size: 80x96, Model: sdxl"


def save(settings=SETTINGS, **changes):
    settings = dataclasses.replace(settings, **changes)
    save_image("a.png", Image.new("RGB", (80, 96)), settings)
    return settings


def save_text(text):
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (16, 16)).save("a.png", pnginfo=info)


def assert_repeats(request, settings):
    assert (request.prompt, request.negative_prompt) == (settings.prompt, settings.negative_prompt)
    assert (request.width, request.height) == (settings.width, settings.height)
    assert request.num_inference_steps == settings.num_inference_steps
    assert request.distilled_guidance_scale == settings.distilled_guidance_scale
    assert request.guidance_scale == settings.guidance_scale
    assert (request.seed, request.num_images) == (settings.seed, 1)
    assert request.schedule == settings.schedule


def test_every_setting_of_the_image_is_repeated(flux, pipeline):
    settings = save()
    ended = flux("generate", "--from", "a.png", "-m", "demo")

    assert ended.exit_code == 0
    assert_repeats(pipeline.requests[0], settings)


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_jpeg_and_webp_are_repeated_too(flux, pipeline, folder, form):
    png = encode_png(bytes(80 * 96 * 3), 80, 96, SETTINGS)
    (folder / f"a.{form}").write_bytes(transcode(png, form))
    flux("generate", "--from", f"a.{form}")

    assert_repeats(pipeline.requests[0], SETTINGS)


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (("a red apple",), "prompt", "a red apple"),
        (("--negative", ""), "negative_prompt", ""),
        (("--seed", "4"), "seed", 4),
        (("--steps", "3"), "num_inference_steps", 3),
        (("--guidance", "3.5"), "distilled_guidance_scale", 3.5),
        (("--true-cfg", "1"), "guidance_scale", 1.0),
        (("--size", "64x64"), "height", 64),
        (("--width", "64"), "width", 64),
        (("--width", "64"), "height", 96),
        (("--schedule", "flux"), "schedule", "flux"),
        (("--seed", "4", "-n", "2"), "num_images", 2),
    ],
)
def test_an_option_given_counts_more_than_the_image(flux, pipeline, flags, name, value):
    save()
    assert flux("generate", *flags, "--from", "a.png").exit_code == 0
    assert getattr(pipeline.requests[0], name) == value


def test_prompts_of_a_file_count_more_than_the_image(flux, pipeline, folder):
    save(seed=1)
    (folder / "prompts.txt").write_text("one\ntwo\n")
    flux("generate", "--prompt-file", "prompts.txt", "--from", "a.png")

    assert [request.prompt for request in pipeline.requests] == ["one", "two"]


def test_the_image_counts_more_than_variables_and_files(flux, pipeline, folder, monkeypatch):
    settings = save()
    monkeypatch.setenv("FLUX_NF4_STEPS", "50")
    monkeypatch.setenv("FLUX_NF4_COUNT", "4")
    (folder / "flux-nf4.toml").write_text('size = "64x64"\nguidance = 1.0\n')
    flux("generate", "--from", "a.png")

    assert_repeats(pipeline.requests[0], settings)


def test_the_same_model_needs_no_note(flux, pipeline):
    save()

    assert "will differ" not in flux("generate", "--from", "a.png", "-m", "demo").err


@pytest.mark.parametrize(
    "changes", [{"model": "flux1-dev"}, {"quantization": "fp8"}, {"dtype": "float32"}]
)
def test_another_model_than_the_images_is_noted(flux, pipeline, changes):
    save(**changes)
    ended = flux("generate", "--from", "a.png", "-m", "demo")

    assert ended.exit_code == 0
    assert "note: `a.png` was made with" in ended.err
    assert next(iter(changes.values())) in ended.err


def test_quiet_says_nothing_of_another_model(flux, pipeline):
    save(model="flux1-dev")

    assert flux("generate", "--from", "a.png", "-q").err == ""


def test_an_image_of_forge_is_repeated_with_a_note(flux, pipeline):
    save_text(FORGE)
    ended = flux("generate", "--from", "a.png")
    expected = dataclasses.replace(
        SETTINGS,
        prompt="a dog",
        seed=5,
        num_inference_steps=9,
        distilled_guidance_scale=2.5,
        guidance_scale=1.0,
    )

    assert_repeats(pipeline.requests[0], expected)
    assert "was not made by flux-nf4" in ended.err


def test_cfg_meant_for_another_model_is_left_out(flux, pipeline):
    save_text(SDXL)
    flux("generate", "--from", "a.png")

    assert pipeline.requests[0].guidance_scale == 1.0
    assert pipeline.requests[0].num_inference_steps == 9


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (FORGE.replace("Seed: 5", "Seed: x"), "`seed` of `a.png` must be a whole number"),
        (FORGE.replace("Steps: 9", "Steps: 0"), "`steps` of `a.png` must be at least 1"),
        (FORGE.replace("80x96", "80x97"), "97"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(flux, pipeline, text, said):
    save_text(text)
    ended = flux("generate", "--from", "a.png")

    assert ended.exit_code == 2
    assert said in ended.err
    assert not pipeline.loaded


def test_an_image_without_settings_cannot_be_repeated(flux, pipeline):
    Image.new("RGB", (16, 16)).save("a.png")
    ended = flux("generate", "--from", "a.png")

    assert ended.exit_code == 2
    assert "`a.png` holds no settings to repeat" in ended.err


def test_an_image_drawn_from_another_needs_that_one(flux, pipeline):
    save(strength=0.5)
    ended = flux("generate", "--from", "a.png")

    assert ended.exit_code == 2
    assert "drawn from another image" in ended.err
    assert "`--image`" in ended.err


@pytest.mark.parametrize(
    ("name", "exit_code"), [("absent.png", 7), ("text.txt", 3), ("short.png", 3)]
)
def test_what_is_no_image_is_an_error(flux, pipeline, folder, name, exit_code):
    (folder / "text.txt").write_text("no such thing")
    save()
    (folder / "short.png").write_bytes((folder / "a.png").read_bytes()[:40])
    ended = flux("generate", "--from", name)

    assert ended.exit_code == exit_code
    assert f"`{name}`" in ended.err
    assert "Traceback" not in ended.err


def test_the_demo_model_draws_the_same_pixels_again(flux, folder):
    flux("generate", "a dog", "-m", "demo", "-s", "64", "--steps", "2", "-n", "2", "-o", "{index}")
    flux("generate", "--from", "2.png", "-m", "demo", "-o", "again.png")

    assert read_image("again.png") == read_image("2.png")
    assert Image.open("again.png").tobytes() == Image.open("2.png").tobytes()
