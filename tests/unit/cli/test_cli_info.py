import dataclasses
import json
import shlex

import image_settings
import pytest
from checkpoints import save_all_in_one
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flux_nf4.pipeline.image_metadata import save_image
from flux_nf4.server.images import encode_png, transcode

SETTINGS = dataclasses.replace(
    image_settings.SETTINGS, prompt='a dog\'s "house"', width=64, height=96, seed=11
)
A1111 = (
    "a dog\nNegative prompt: rain\n"
    "Steps: 20, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.5, "
    "Seed: 5, Size: 896x1152, Model: flux1-dev-bnb-nf4-v2"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny all-in-one file in NF4 v2."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_all_in_one(path)
    return path


def save_a1111(path):
    info = PngInfo()
    info.add_text("parameters", A1111)
    Image.new("RGB", (16, 16)).save(path, pnginfo=info)


def test_a_checkpoint_is_told_in_full(flux, checkpoint):
    ended = flux("info", str(checkpoint))

    assert ended.exit_code == 0
    assert ended.out.startswith("tiny.safetensors\n")
    for word in ("FLUX.1 dev", "all-in-one", "nf4 v2", "unknown", "T5 encoder", "VAE"):
        assert word in ended.out


def test_a_checkpoint_in_json_adds_up(flux, checkpoint):
    told = json.loads(flux("info", str(checkpoint), "--json").out)
    stored = [form for part in told["parts"] for form in part["stored"].values()]

    assert (told["kind"], told["layout"], told["variant"]) == ("checkpoint", "all-in-one", "dev")
    assert told["quantization"] == "nf4 v2"
    assert told["bytes"] == sum(form["bytes"] for form in stored)
    assert [part["part"] for part in told["parts"]] == ["transformer", "t5", "clip", "vae"]
    assert (told["missing"], told["facts"]["name"]) == ([], "tiny")


@pytest.mark.parametrize("name", ["flux1-kontext-dev-nf4", "FLUX.1-Krea-dev"])
def test_what_only_the_name_tells_is_said_to_be_told_by_it(flux, checkpoint, folder, name):
    file = folder / f"{name}.safetensors"
    file.write_bytes(checkpoint.read_bytes())

    done = flux("info", str(file))

    told = "Kontext" if "kontext" in name else "Krea"
    assert f"by its name {told}" in done.out


def test_a_model_that_is_only_called_like_the_demo_is_not_taken_for_it(flux, folder):
    settings = dataclasses.replace(SETTINGS, model="demolition-dev")
    save_image(folder / "a.png", Image.new("RGB", (64, 96)), settings)

    assert flux("info", "a.png").out.endswith("--from a.png -m PATH/TO/demolition-dev\n")


def test_parts_that_are_missing_are_named(flux, checkpoint, folder):
    from flux_nf4.formats.allinone import write_all_in_one
    from flux_nf4.formats.checkpoint import open_checkpoint

    transformer = open_checkpoint(checkpoint).components["transformer"].entries
    write_all_in_one("part.safetensors", {"transformer": transformer}, None)
    ended = flux("info", "part.safetensors")

    assert [line.split("  ")[1] for line in ended.out.splitlines() if "missing" in line] == [
        "T5 encoder",
        "CLIP encoder",
        "VAE",
    ]


def test_the_command_that_repeats_an_image_names_file_and_model(flux, folder):
    save_image("a.png", Image.new("RGB", (64, 96)), SETTINGS)
    command = flux("info", "a.png").out.splitlines()[-1].strip()

    assert command == "flux-nf4 generate --from a.png -m demo"


def test_the_command_that_repeats_an_image_does(flux, pipeline, folder):
    flux("generate", "a dog", "--seed", "4", "--steps", "3", "-o", "a.png", "-m", "demo")
    command = json.loads(flux("info", "a.png", "--json").out)["command"]
    flux(*shlex.split(command)[1:])

    assert pipeline.requests[0] == pipeline.requests[1]


def test_an_image_drawn_from_another_says_that_it_is_needed(flux, folder):
    settings = dataclasses.replace(SETTINGS, strength=0.5)
    save_image("a.png", Image.new("RGB", (64, 96)), settings)
    command = flux("info", "a.png").out.splitlines()[-1].strip()

    assert command == "flux-nf4 generate --from a.png --image PATH/TO/IMAGE -m demo"


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_settings_are_read_from_every_format(flux, folder, form):
    png = encode_png(bytes(64 * 96 * 3), 64, 96, SETTINGS)
    (folder / "a.image").write_bytes(transcode(png, form))
    told = json.loads(flux("info", "a.image", "--json").out)

    assert told["settings"]["seed"] == SETTINGS.seed
    assert told["is_declared_generated"] is True


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_a1111s_own_files_are_read_in_every_format(flux, folder, form):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111.encode("utf-16-be")
    Image.new("RGB", (16, 16)).save("a.image", form, exif=exif)
    told = json.loads(flux("info", "a.image", "--json").out)

    assert told["parameters"] == A1111
    assert told["command"].startswith("flux-nf4 generate --from a.image")


def test_settings_are_read_back(flux, folder):
    save_image("a.png", Image.new("RGB", (64, 96)), SETTINGS)
    told = json.loads(flux("info", "a.png", "--json").out)

    assert told["settings"]["prompt"] == SETTINGS.prompt
    assert (told["kind"], told["width"], told["height"]) == ("image", 64, 96)
    assert told["is_declared_generated"] is True


def test_an_image_of_other_tools_gives_a_command_too(flux, folder):
    save_a1111("a.png")

    assert flux("info", "a.png").out.splitlines()[-1].strip() == (
        "flux-nf4 generate --from a.png -m PATH/TO/flux1-dev-bnb-nf4-v2"
    )


def test_an_image_without_settings_says_so(flux, folder):
    Image.new("RGB", (16, 32)).save("a.png")
    ended = flux("info", "a.png")

    assert ended.out == "a.png: 16 x 32 pixels, without settings in it\n"


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        ((), 2, "no path is given"),
        (("absent",), 3, "`absent`"),
        (("text.safetensors",), 3, "`text.safetensors`"),
        (("short.png",), 3, "`short.png`"),
        (("empty",), 3, "`empty`"),
    ],
)
def test_what_cannot_be_read_is_an_error(flux, folder, arguments, exit_code, said):
    (folder / "text.safetensors").write_text("no such thing")
    Image.new("RGB", (16, 16)).save(folder / "whole.png")
    (folder / "short.png").write_bytes((folder / "whole.png").read_bytes()[:40])
    (folder / "empty").mkdir()
    ended = flux("info", *arguments)

    assert ended.exit_code == exit_code
    assert said in ended.err.splitlines()[0]
    assert "Traceback" not in ended.err


def test_control_characters_in_an_image_do_not_reach_the_terminal(flux, folder):
    info = PngInfo()
    info.add_text("parameters", A1111.replace("a dog", "a \x1b]0;owned\x07 dog"))
    Image.new("RGB", (16, 16)).save("a.png", pnginfo=info)

    assert "\x1b" not in flux("info", "a.png").out
