import json
import os

import pytest
import torch
from checkpoints import (
    PREFIX,
    TINY_FACTS,
    save_all_in_one,
    save_all_in_one_v1,
    save_diffusers_folder,
    save_quantized_diffusers_folder,
)

from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.formats.tensorfile import TensorFile
from flux_nf4.nf4 import reference
from flux_nf4.nf4.codec import NF4Weight


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny checkpoints: `v2.safetensors`, `v1.safetensors`, `bf16` and `nested` folders."""
    folder = tmp_path_factory.mktemp("models")
    save_all_in_one(folder / "v2.safetensors")
    save_all_in_one_v1(folder / "v1.safetensors", facts=TINY_FACTS)
    save_diffusers_folder(folder / "bf16")
    save_quantized_diffusers_folder(folder / "nested", nested=True)
    return folder


def transformer_of(path):
    return open_checkpoint(path).components["transformer"].entries


def values_of(path):
    return {
        name: reference.dequantize(entry) if isinstance(entry, NF4Weight) else entry.float()
        for name, entry in transformer_of(path).items()
    }


def assert_same_values(left, right):
    ours, theirs = values_of(left), values_of(right)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("name", ["v2", "v1"])
def test_a_file_that_became_a_folder_becomes_the_same_file_again(flux, models, folder, name):
    source = models / f"{name}.safetensors"
    flux("convert", str(source), "there", "--layout", "diffusers")
    flux("convert", "there", "back.safetensors")
    # Tiny nested statistics end within a block of 256, so v1 comes back un-nested there: by value.
    if name == "v2":
        assert (folder / "back.safetensors").read_bytes() == source.read_bytes()
    else:
        assert_same_values(folder / "back.safetensors", source)


def test_a_folder_that_became_a_file_becomes_the_same_weights_again(flux, models, folder):
    flux("convert", str(models / "bf16"), "all.safetensors")
    flux("convert", "all.safetensors", "again", "--layout", "diffusers")

    for part in ("transformer", "text_encoder_2", "vae"):
        (theirs,) = (models / "bf16" / part).glob("*.safetensors")
        before, after = TensorFile(theirs), TensorFile(folder / "again" / part / theirs.name)
        assert after.infos == before.infos
        assert all(torch.equal(after.tensor(name), before.tensor(name)) for name in before.names)


def test_converting_to_its_own_layout_gives_the_same_bytes(flux, models, folder):
    for name in ("v2", "v1"):
        source = models / f"{name}.safetensors"
        flux("convert", str(source), f"{name}.safetensors")
        assert (folder / f"{name}.safetensors").read_bytes() == source.read_bytes()


def test_v2_un_nests_every_weight_and_no_value_changes(flux, models, folder):
    flux("convert", str(models / "v1.safetensors"), "new.safetensors", "--format", "v2")

    assert open_checkpoint(folder / "new.safetensors").quantization == "nf4 v2"
    assert_same_values(folder / "new.safetensors", models / "v1.safetensors")


def test_bf16_is_what_the_weights_decode_to(flux, models, folder):
    flux("convert", str(models / "v2.safetensors"), "new.safetensors", "--format", "bf16")

    assert open_checkpoint(folder / "new.safetensors").quantization == "bf16"
    assert_same_values(folder / "new.safetensors", models / "v2.safetensors")


def test_nested_parts_that_are_fused_say_what_moved(flux, models, folder):
    ended = flux("convert", str(models / "nested"), "new.safetensors")

    assert "no value changes" in ended.err
    assert "bytes of statistics become" in ended.err
    assert_same_values(folder / "new.safetensors", models / "nested")


def test_text_encoders_whose_values_fp8_cannot_hold_stay_as_they_are(flux, models, folder):
    ended = flux("convert", str(models / "bf16"), "new.safetensors")
    file = TensorFile(folder / "new.safetensors")

    assert "T5 stays as it is stored" in ended.err
    assert file.infos["text_encoders.t5xxl.transformer.shared.weight"].dtype == torch.bfloat16


def test_a_transformer_alone_is_written(flux, models, folder):
    flux("convert", str(models / "v2.safetensors"), "t.safetensors", "--layout", "transformer-only")

    assert open_checkpoint(folder / "t.safetensors").layout == "transformer-only"
    assert all(name.startswith(PREFIX) for name in TensorFile(folder / "t.safetensors").names)


def test_parts_put_together_again_are_the_same_file(flux, models, folder):
    source = models / "v2.safetensors"
    flux("convert", str(source), "p", "--parts")
    parts = [
        (f"--{kind}", f"p/{kind}.safetensors") for kind in ("transformer", "t5", "clip", "vae")
    ]
    ended = flux("convert", "new.safetensors", *(word for pair in parts for word in pair))

    assert ended.exit_code == 0
    assert (folder / "new.safetensors").read_bytes() == source.read_bytes()


def test_a_part_takes_the_place_of_the_checkpoint_s_own(flux, models, folder):
    flux(
        "convert",
        str(models / "v2.safetensors"),
        "a.safetensors",
        "--vae",
        str(models / "bf16/vae"),
    )
    vae = open_checkpoint(folder / "a.safetensors").components["vae"].entries
    theirs = open_checkpoint(models / "bf16").components["vae"].entries

    assert torch.equal(vae["decoder.conv_in.weight"], theirs["decoder.conv_in.weight"])


def test_what_exists_is_replaced_only_by_force(flux, models, folder):
    (folder / "a.safetensors").write_text("mine")
    source = str(models / "v2.safetensors")
    refused = flux("convert", source, "a.safetensors")

    assert (refused.exit_code, (folder / "a.safetensors").read_text()) == (2, "mine")
    assert "--force" in refused.err
    assert flux("convert", source, "a.safetensors", "--force").exit_code == 0


def test_a_model_s_folder_is_replaced_by_force_and_nothing_else_is(flux, models, folder):
    source = str(models / "v2.safetensors")
    flux("convert", source, "d", "--layout", "diffusers")
    assert flux("convert", source, "d", "--layout", "diffusers", "--force").exit_code == 0
    (folder / "d" / "diary.txt").write_text("mine")
    ended = flux("convert", source, "d", "--layout", "diffusers", "--force")

    assert (ended.exit_code, (folder / "d" / "diary.txt").read_text()) == (2, "mine")
    assert "diary.txt" in ended.err
    assert [each.name for each in folder.iterdir()] == ["d"]


@pytest.mark.parametrize(
    ("source", "destination", "options"),
    [
        ("d/transformer", "d", ("--layout", "diffusers")),
        ("d", "d", ("--layout", "diffusers")),
        ("a.safetensors", "a.safetensors", ("--layout", "transformer-only")),
    ],
)
def test_what_is_being_converted_is_never_replaced(
    flux, models, folder, source, destination, options
):
    v2 = str(models / "v2.safetensors")
    flux("convert", v2, "d", "--layout", "diffusers")
    flux("convert", v2, "a.safetensors")
    ended = flux("convert", source, destination, "--force", *options)

    assert (ended.exit_code, "is being converted" in ended.err) == (2, True)
    assert open_checkpoint(folder / destination).missing == ()


def test_a_folder_is_not_left_half_written(flux, models, folder, monkeypatch):
    calls = []

    def fail(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr("os.fsync", fail)
    ended = flux("convert", str(models / "v2.safetensors"), "d", "--layout", "diffusers")

    assert (ended.exit_code, list(folder.iterdir())) == (7, [])


def test_a_full_disk_is_noticed_before_anything_is_written(flux, models, folder, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1000))
    ended = flux("convert", str(models / "v2.safetensors"), "a.safetensors")

    assert (ended.exit_code, list(folder.iterdir())) == (7, [])


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        ((), 2, "no source or no destination"),
        (("a",), 2, "no source or no destination"),
        (("nowhere", "b"), 3, "there is no model"),
        (("{v2}", "b.safetensors", "--layout", "diffusers"), 2, "is to be a folder"),
        (("{v2}", "b", "--layout", "diffusers", "--parts"), 2, "two layouts"),
        (("{v2}", "b", "--t5", "nowhere"), 3, "nowhere"),
        (("{v2}", "b", "--t5", "{vae}"), 3, "no FLUX t5 has"),
        (("b", "--t5", "{v2}"), 2, "no transformer"),
        (("{v2}", "no/such/b"), 7, "could not write"),
        (("{v2}", "b" * 300), 7, "could not write"),
        (("{v2}", "b\0"), 2, "no path at all"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_nothing(
    flux, models, folder, arguments, exit_code, said
):
    places = {
        "{v2}": str(models / "v2.safetensors"),
        "{vae}": str(models / "bf16/vae/diffusion_pytorch_model.safetensors"),
    }
    ended = flux("convert", *(places.get(word, word) for word in arguments))

    assert (ended.exit_code, list(folder.iterdir())) == (exit_code, [])
    assert said in ended.err


def test_the_json_names_files_bytes_and_notes(flux, models, folder):
    ended = flux("convert", str(models / "v2.safetensors"), "d", "--layout", "diffusers", "--json")
    told = json.loads(ended.out)
    sizes = {file["file"]: (folder / "d" / file["file"]).stat().st_size for file in told["files"]}

    assert sizes == {file["file"]: file["bytes"] for file in told["files"]}
    assert told["bytes"] == sum(sizes.values())
    assert (ended.err, told["layout"], len(told["notes"])) == ("", "diffusers", 1)


def test_progress_is_told_where_it_takes_long(flux, models, monkeypatch):
    monkeypatch.setattr("flux_nf4.cli.byte_progress.PATIENCE_S", 0.0)
    ended = flux("convert", str(models / "v2.safetensors"), "a.safetensors")

    assert "writing: 100 %" in ended.err


def test_who_draws_from_parts_is_told_how_to_join_them(flux, models):
    flux("convert", str(models / "v2.safetensors"), "p", "--parts")

    for path in ("p", "p/transformer.safetensors"):
        ended = flux("generate", "a dog", "-m", path)
        assert ended.exit_code in (2, 3)
        assert "`flux-nf4 convert` makes" in ended.err
