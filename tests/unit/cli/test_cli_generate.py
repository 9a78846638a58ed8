import io
from pathlib import Path

import pytest
from PIL import Image
from tiny_config import tiny

from flux_nf4.errors import (
    Cancelled,
    DiskError,
    DoesNotFitError,
    FormatError,
    InputError,
    LicenceError,
    ModelNotFoundError,
    NetworkError,
    NumericalError,
)
from flux_nf4.model.config import FluxConfig
from flux_nf4.pipeline.image_metadata import read_image


def test_an_image_lies_in_outputs_under_prompt_and_seed(flux, pipeline, folder):
    ended = flux("generate", "A Dog!", "--seed", "7")

    assert ended.exit_code == 0
    assert ended.out == "outputs/a-dog-7.png\n"
    assert Image.open(folder / "outputs/a-dog-7.png").size == (64, 64)


def test_nothing_but_the_image_is_left_behind(flux, pipeline, folder):
    flux("generate", "a dog", "--seed", "7", "--preview")

    assert [path.name for path in folder.rglob("*.*")] == ["a-dog-7.png"]


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (("--steps", "3"), "num_inference_steps", 3),
        (("--guidance", "2.5"), "distilled_guidance_scale", 2.5),
        (("--true-cfg", "4"), "guidance_scale", 4.0),
        (("--negative", "rain"), "negative_prompt", "rain"),
        (("--seed", "18446744073709551615"), "seed", 2**64 - 1),
        (("-n", "2"), "num_images", 2),
        (("--count", "2"), "num_images", 2),
        (("--width", "128"), "width", 128),
        (("--height", "128"), "height", 128),
        (("--size", "96x112"), "height", 112),
        (("-s", "96X112"), "width", 96),
        (("-s", "128"), "height", 128),
        (("--schedule", "forge"), "schedule", "forge"),
        (("--preview",), "num_previews", 8),
        (("--no-preview",), "num_previews", 0),
    ],
)
def test_an_option_reaches_the_request(flux, pipeline, flags, name, value):
    assert flux("generate", "a dog", *flags).exit_code == 0
    assert getattr(pipeline.requests[0], name) == value


def test_the_models_own_size_is_the_default(flux, pipeline):
    flux("generate", "a dog")

    assert (pipeline.requests[0].width, pipeline.requests[0].height) == (64, 64)


def test_schnell_takes_four_steps(flux, pipeline):
    pipeline.model.variant = "schnell"
    flux("generate", "a dog")

    assert pipeline.requests[0].num_inference_steps == 4


def test_device_and_model_reach_the_loader(flux, pipeline):
    flux("generate", "a dog", "-m", "flux.safetensors", "--device", "cpu")
    path, settings = pipeline.loaded[0]

    assert (path, settings.device) == (Path("flux.safetensors"), "cpu")


@pytest.mark.parametrize("flags", [(), ("-m", "demo")])
def test_the_demo_model_is_meant_by_no_path(flux, pipeline, flags):
    flux("generate", "a dog", *flags)

    assert pipeline.loaded[0][0] is None


def test_the_default_model_is_named_in_one_line(flux, pipeline):
    ended = flux("generate", "a dog")
    notes = [line for line in ended.err.splitlines() if line.startswith("note:")]

    assert len(notes) == 1
    assert "demo model" in notes[0]
    assert "-m flux1-dev-bnb-nf4-v2.safetensors" in notes[0]


def test_a_model_that_was_asked_for_needs_no_note(flux, pipeline):
    assert "note:" not in flux("generate", "a dog", "-m", "demo").err


def test_a_prompt_that_names_nothing_known_is_said_in_one_line(flux, pipeline):
    ended = flux("generate", "gravel and dust", "-m", "demo")
    notes = [line for line in ended.err.splitlines() if line.startswith("note:")]

    assert len(notes) == 1
    assert "`gravel and dust`" in notes[0]
    assert "`flux-nf4 demo`" in notes[0]


def test_other_models_are_not_measured_by_the_demos_words(flux, pipeline):
    assert "flux-nf4 demo" not in flux("generate", "gravel", "-m", "x.safetensors").err


def test_a_random_seed_is_reported_and_differs(flux, pipeline):
    said = [flux("generate", "a dog", "-o", "x/").err for _ in range(2)]
    seeds = [request.seed for request in pipeline.requests]

    assert f"seed {seeds[0]}" in said[0]
    assert seeds[0] != seeds[1]


def test_json_is_one_object_an_image(flux, pipeline):
    first, second = flux("generate", "a dog", "-n", "2", "--seed", "5", "--json").json_lines

    assert (first["path"], first["seed"], first["index"]) == ("outputs/a-dog-5.png", 5, 1)
    assert (second["seed"], second["index"]) == (6, 2)
    assert first["num_inference_steps"] == 20
    assert (first["width"], first["height"]) == (64, 64)
    assert first["seconds"] >= 0


def test_quiet_prints_the_path_alone(flux, pipeline):
    ended = flux("generate", "gravel", "--seed", "1", "--quiet")

    assert (ended.out, ended.err) == ("outputs/gravel-1.png\n", "")


def test_each_tenth_gets_a_line_where_no_terminal_is(flux, pipeline):
    said = flux("generate", "a dog", "--steps", "20").err.splitlines()
    tenths = [line.split("%")[0] for line in said if line.startswith("denoising")]

    assert tenths == [f"denoising: {percent} " for percent in range(10, 101, 10)]


def test_tenths_count_over_all_images_and_prompts(flux, pipeline, folder):
    (folder / "prompts.txt").write_text("a dog\nan apple\n")
    said = flux("generate", "--prompt-file", "prompts.txt", "-n", "2", "--steps", "5").err

    assert "denoising: 50 % (10/20 steps)" in said


def test_what_the_pipeline_notices_is_passed_on(flux, pipeline):
    pipeline.notice = "the prompt was cut"

    assert "note: the prompt was cut" in flux("generate", "a dog").err


def test_the_settings_are_in_the_image(flux, pipeline, folder):
    flux("generate", "a dog", "--seed", "3", "--steps", "2", "-o", "dog.png")
    settings = read_image(folder / "dog.png").settings

    assert settings is not None
    assert (settings.prompt, settings.seed, settings.num_inference_steps) == ("a dog", 3, 2)
    assert (settings.model, settings.quantization, settings.dtype) == (
        "flux-demo",
        "nf4 v2",
        "bfloat16",
    )


def test_no_guidance_is_written_where_the_model_embeds_none(flux, pipeline):
    pipeline.model.embeds_guidance = False

    assert flux("generate", "a dog", "--json").json_lines[0]["distilled_guidance_scale"] is None


def test_a_preview_is_a_whole_picture_and_goes_with_the_image(flux, pipeline, folder):
    seen = []
    path = folder / "outputs/a-dog-7.preview.png"

    def look(step):
        if path.exists():
            with Image.open(path) as picture:
                picture.load()
            seen.append(step)

    pipeline.on_step = look
    flux("generate", "a dog", "--seed", "7", "--preview", "--steps", "16")

    assert seen == list(range(1, 17))
    assert not path.exists()


def picture(folder, name, size=(96, 128), mode="RGB"):
    Image.new(mode, size, "white").save(folder / name)


def test_an_image_a_mask_and_a_strength_reach_the_request(flux, pipeline, folder):
    picture(folder, "photo.jpg")
    picture(folder, "mask.png", mode="L")
    flux("generate", "a dog", "--image", "photo.jpg", "--mask", "mask.png", "--strength", "0.3")
    (request,) = pipeline.requests

    assert (request.image.size, request.mask_image.size) == ((96, 128), (96, 128))
    assert request.strength == 0.3


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), (48 + 16, 80)),
        (("--width", "96"), (96, 128)),
        (("--height", "192"), (144, 192)),
        (("--size", "64x64"), (64, 64)),
    ],
)
def test_an_image_has_a_say_in_the_size(flux, pipeline, folder, flags, expected):
    picture(folder, "photo.png")
    flux("generate", "a dog", "--image", "photo.png", *flags)

    assert (pipeline.requests[0].width, pipeline.requests[0].height) == expected


def test_the_steps_that_an_image_leaves_are_counted(flux, pipeline, folder):
    picture(folder, "photo.png")
    said = flux("generate", "a dog", "--image", "photo.png", "--strength", "0.5").err

    assert "denoising: 50 % (5/10 steps)" in said
    assert "10 steps," in said.splitlines()[-1]


@pytest.mark.parametrize(("flags", "strength"), [(("--image", "photo.png"), 0.6), ((), None)])
def test_the_strength_is_written_where_there_was_an_image(flux, pipeline, folder, flags, strength):
    picture(folder, "photo.png")

    assert flux("generate", "a dog", "--json", *flags).json_lines[0]["strength"] == strength


def test_a_preview_goes_when_the_run_fails(flux, pipeline, folder):
    pipeline.error = NumericalError("NaN in `decode`")
    flux("generate", "a dog", "--preview")

    assert list(folder.rglob("*.png")) == []


# ---- prompts ------------------------------------------------------------------------------------


def test_a_file_gives_one_prompt_a_line(flux, pipeline, folder):
    (folder / "prompts.txt").write_text("\ufeffa dog\n\n  an apple  \r\n", encoding="utf-8")
    flux("generate", "--prompt-file", "prompts.txt")

    assert [request.prompt for request in pipeline.requests] == ["a dog", "an apple"]


def test_a_prompt_ends_where_an_editor_ends_a_line(flux, pipeline, folder):
    prompts = "a dog\u2028and a wolf\r\n\fan apple\r"
    (folder / "prompts").write_text(prompts, encoding="utf-8", newline="")
    flux("generate", "--prompt-file", "prompts")

    assert [each.prompt for each in pipeline.requests] == ["a dog\u2028and a wolf", "an apple"]


def test_a_hyphen_reads_standard_input(flux, pipeline, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a dog\n")))
    flux("generate", "--prompt-file", "-")

    assert pipeline.requests[0].prompt == "a dog"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no prompt is given"),
        (("",), "the prompt is empty"),
        ((" \n",), "the prompt is empty"),
        (("\udcff",), "the prompt is not valid text"),
        (("a", "--prompt-file", "x"), "both a prompt and `--prompt-file`"),
        (("--prompt-file", "absent.txt"), "cannot read `absent.txt`"),
        (("--prompt-file", "."), "cannot read `.`"),
        (("--prompt-file", "empty.txt"), "`empty.txt` holds no prompt"),
        (("--prompt-file", "latin.txt"), "`latin.txt` is not UTF-8: byte 1 is 0xfc"),
        (("a", "--size", "12by12"), "`--size` must be WIDTHxHEIGHT, got `12by12`"),
        (("a", "--size", "-16x16"), "`--size` must be WIDTHxHEIGHT"),
        (("a", "--size", "100x64"), "a width of 100 pixels cannot be drawn"),
        (("a", "--size", "0x64"), "a width of 0 pixels cannot be drawn"),
        (("a" * 100_001,), "`prompt` has 100001 characters"),
        (
            ("a", "--seed", str(2**64 - 1), "-n", "2"),
            f"`seed` {2**64 - 1} leaves no seeds for 2 images",
        ),
        (
            ("a", "--size", "64x64", "--width", "64"),
            "the command line gives both `size` and `width`",
        ),
        (("a", "--steps", "0"), "`--steps` must be at least 1, got 0"),
        (("a", "--steps", "1001"), "`--steps` must be at most 1000"),
        (("a", "--steps", "2.5"), "`--steps` must be a whole number, got `2.5`"),
        (("a", "--seed", "-1"), "`--seed` must be at least 0"),
        (("a", "--seed", str(2**64)), "`--seed` must be at most 18446744073709551615"),
        (("a", "--seed", "9" * 5000), "`--seed` must be a whole number"),
        (("a", "--guidance", "nan"), "`--guidance` must be a finite number, got `nan`"),
        (("a", "--true-cfg", "inf"), "`--true-cfg` must be a finite number"),
        (("a", "--true-cfg", "0.5"), "`--true-cfg` must be at least 1"),
        (("a", "--count", "0"), "`--count` must be at least 1"),
        (("a", "--mask", "wide.png"), "`--mask` is for drawing from an image, and none is given"),
        (("a", "--strength", "0.5"), "`--strength` is for drawing from an image"),
        (("a", "--image", "wide.png", "--strength", "0"), "`--strength` must be at least 0.01"),
        (("a", "--image", "absent.png"), "cannot read the image `absent.png`: No such file"),
        (("a", "--image", "."), "cannot read the image `.`: Is a directory"),
        (
            ("a", "--image", "wide.png", "--mask", "high.png"),
            "the mask of 64 x 128 pixels does not lie on the image of 128 x 64",
        ),
        (("a", "--schedule", "karras"), "`--schedule` must be `flux` or `forge`, got `karras`"),
    ],
)
def test_bad_usage_is_said_before_anything_is_loaded(flux, pipeline, folder, arguments, said):
    picture(folder, "wide.png", (128, 64))
    picture(folder, "high.png", (64, 128))
    (folder / "empty.txt").write_text("\n \n")
    (folder / "latin.txt").write_bytes(b"g\xfcn")
    ended = flux("generate", *arguments)

    assert ended.exit_code == 2
    assert f"error: {said}" in ended.err
    assert "Traceback" not in ended.err
    assert pipeline.loaded == []


# ---- how a run ends -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (NumericalError("NaN"), 1),
        (InputError("bad"), 2),
        (FormatError("corrupt"), 3),
        (ModelNotFoundError("absent"), 3),
        (LicenceError("locked"), 4),
        (DoesNotFitError("large"), 5),
        (NetworkError("offline"), 6),
        (DiskError("full"), 7),
        (Cancelled("stopped"), 130),
        (MemoryError(), 5),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), 5),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to"), 5),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_each_error_has_its_exit_code_and_no_traceback(flux, pipeline, folder, error, exit_code):
    pipeline.error = error
    ended = flux("generate", "a dog")

    assert ended.exit_code == exit_code
    assert "error: " in ended.err
    assert "Traceback" not in ended.err
    assert list(folder.rglob("*.png")) == []


def test_a_hint_has_a_line_of_its_own(flux, pipeline):
    pipeline.error = FormatError("`x` is cut short", hint="download it again")
    last = flux("generate", "a dog").err.splitlines()[-2:]

    assert last == ["error: `x` is cut short", "hint: download it again"]


def test_debug_shows_the_traceback(flux, pipeline):
    pipeline.error = FormatError("`x` is cut short")
    ended = flux("generate", "a dog", "--debug")

    assert ended.exit_code == 3
    assert "Traceback" in ended.err
    assert "error: `x` is cut short" in ended.err


def test_a_variable_asks_for_tracebacks_too(flux, pipeline, monkeypatch):
    monkeypatch.setenv("FLUX_NF4_DEBUG", "1")
    pipeline.error = FormatError("`x` is cut short")

    assert "Traceback" in flux("generate", "a dog").err


def test_control_characters_do_not_reach_the_terminal(flux, pipeline):
    pipeline.error = FormatError("unknown name `\x1b]0;owned\x07`")

    assert "\x1b" not in flux("generate", "a dog").err


def test_images_that_were_done_before_an_error_stay(flux, pipeline, folder):
    (folder / "prompts.txt").write_text("a dog\nan apple\n")
    pipeline.on_step = lambda step: setattr(
        pipeline, "error", DiskError("full") if len(pipeline.requests) == 2 else None
    )
    ended = flux("generate", "--prompt-file", "prompts.txt", "--seed", "1")

    assert ended.exit_code == 7
    assert [path.name for path in folder.rglob("*.png")] == ["a-dog-1.png"]


@pytest.mark.parametrize(
    ("config", "size", "expected"),
    [(tiny(), "256", [1]), (tiny(), "1024", [4]), (FluxConfig(), "256", [4])],
    ids=["small image of a narrow model", "large image", "wide model"],
)
def test_only_small_images_of_a_narrow_model_take_one_thread(
    flux, pipeline, monkeypatch, config, size, expected
):
    asked = []
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    pipeline.model.transformer.config = config
    flux("generate", "a dog", "--size", size)

    assert asked == expected
