import dataclasses
import json

import pytest
from PIL import Image

from flux_nf4.errors import DiskError, FormatError
from flux_nf4.pipeline.image_metadata import (
    SOURCE_TYPE,
    ImageSettings,
    parse_a1111,
    read_image,
    save_image,
)
from flux_nf4.pipeline.png import write_png

SETTINGS = ImageSettings(
    prompt="a red apple, on a table",
    negative_prompt="blurry",
    width=896,
    height=1152,
    num_inference_steps=20,
    guidance_scale=1.0,
    distilled_guidance_scale=3.5,
    seed=12345,
    max_sequence_length=512,
    model="flux1-dev",
    quantization="nf4 v2",
    dtype="bfloat16",
    version="0.1.0",
)


def changed(**changes):
    return dataclasses.replace(SETTINGS, **changes)


@pytest.fixture
def image():
    return Image.new("RGB", (16, 16), "red")


def test_the_text_is_as_a1111_and_forge_write_it():
    assert SETTINGS.to_a1111() == (
        "a red apple, on a table\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: Euler, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 12345, "
        "Size: 896x1152, Model: flux1-dev, Version: flux-nf4 0.1.0"
    )


def test_without_negative_prompt_its_line_is_left_out():
    assert "Negative" not in changed(negative_prompt="").to_a1111()


def test_without_guidance_embedding_its_scale_is_left_out():
    assert "Distilled" not in changed(distilled_guidance_scale=None).to_a1111()


def test_the_forge_schedule_is_named_as_forge_names_it():
    assert "Schedule type: Simple" in changed(schedule="forge").to_a1111()


@pytest.mark.parametrize("name", ["a, b", "a: b", "a\nb", 'say "hi", then', "c:\\models"])
def test_a_value_with_separators_is_quoted_and_comes_back(name):
    text = changed(model=name).to_a1111()
    assert parse_a1111(text)["Model"] == name
    assert len(text.split("\n")) == 3


def test_prompts_of_several_lines_come_back():
    pairs = parse_a1111(changed(prompt="a\nb: c, d", negative_prompt="e\nf").to_a1111())
    assert pairs["Prompt"] == "a\nb: c, d"
    assert pairs["Negative prompt"] == "e\nf"
    assert pairs["Seed"] == "12345"


def test_a_text_without_pairs_is_all_prompt():
    assert parse_a1111("a cat\nin: two, lines") == {"Prompt": "a cat\nin: two, lines"}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("part", [" ", "a", "a ", ":", '"', 'a: "', "a: b,", "\\", "a:", "\n"])
def test_a_hostile_text_takes_no_longer_than_its_length(part):
    assert isinstance(parse_a1111("a" + part * 400_000 + "a"), dict)


def test_an_empty_text_has_nothing():
    assert parse_a1111("") == {}


def test_a_text_of_forge_is_read():
    text = (
        "Astronaut in a jungle\n"
        "Steps: 20, Sampler: Euler, Schedule type: Simple, CFG scale: 1, "
        "Distilled CFG Scale: 3.5, Seed: 12345, Size: 896x1152, Model hash: f0770152, "
        'Lora hashes: "a: 1, b: 2", Module 1: ae, Version: f2.0.1'
    )
    pairs = parse_a1111(text)
    assert pairs["Prompt"] == "Astronaut in a jungle"
    assert pairs["Schedule type"] == "Simple"
    assert pairs["Lora hashes"] == "a: 1, b: 2"


def test_an_image_gives_its_settings_back(tmp_path, image):
    settings = changed(prompt='猫 "quoted",\nline two', seed=2**64 - 1)
    save_image(tmp_path / "a.png", image, settings)
    record = read_image(tmp_path / "a.png")
    assert record.settings == settings
    assert record.parameters == settings.to_a1111()


def test_an_image_says_that_a_model_made_it(tmp_path, image):
    save_image(tmp_path / "a.png", image, SETTINGS)
    assert read_image(tmp_path / "a.png").is_declared_generated


def test_pillow_finds_the_source_type_in_xmp(tmp_path, image):
    save_image(tmp_path / "a.png", image, SETTINGS)
    with Image.open(tmp_path / "a.png") as opened:
        assert SOURCE_TYPE in opened.info["XML:com.adobe.xmp"]


def test_the_xmp_packet_is_well_formed(tmp_path, image):
    from xml.etree import ElementTree as ET

    save_image(tmp_path / "a.png", image, SETTINGS)
    with Image.open(tmp_path / "a.png") as opened:
        packet = opened.info["XML:com.adobe.xmp"]
    root = ET.fromstring(packet)  # ours, not a stranger's
    assert any(SOURCE_TYPE in value for node in root.iter() for value in node.attrib.values())


def test_a_plain_image_has_no_settings(tmp_path, image):
    image.save(tmp_path / "a.png")
    record = read_image(tmp_path / "a.png")
    assert record.settings is None
    assert not record.pairs
    assert not record.is_declared_generated


def test_a_field_of_a_newer_version_is_passed_over():
    text = json.dumps(dataclasses.asdict(SETTINGS) | {"a_new_field": 1})
    assert ImageSettings.from_json(text) == SETTINGS


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "lack prompt, width"),
        (json.dumps(dataclasses.asdict(SETTINGS) | {"seed": "1"}), "`seed` must be int"),
        (json.dumps(dataclasses.asdict(SETTINGS) | {"width": True}), "`width` must be int"),
        (json.dumps(dataclasses.asdict(SETTINGS) | {"prompt": None}), "`prompt` must be str"),
    ],
)
def test_damaged_settings_are_a_format_error(tmp_path, image, text, reason):
    write_png(tmp_path / "a.png", image, {"flux_nf4": text})
    with pytest.raises(FormatError, match=reason):
        read_image(tmp_path / "a.png")


def test_a_missing_file_cannot_be_read(tmp_path):
    with pytest.raises(DiskError, match="No such file"):
        read_image(tmp_path / "absent.png")


def test_no_permission_is_a_disk_error(tmp_path, image):
    folder = tmp_path / "a.png"
    folder.write_text("a file, not a folder")
    with pytest.raises(DiskError):
        save_image(folder / "b.png", image, SETTINGS)
