"""`flux-nf4 quantize`, as people run it."""

import json
import os
import shutil
import stat

import pytest
import torch
from checkpoints import PREFIX, TINY_FACTS, cast, save_all_in_one, save_diffusers_folder
from safetensors.torch import load_file, save, save_file

from flux_nf4.formats.bnb import tensors_from_weight
from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.formats.tensorfile import TensorFile
from flux_nf4.nf4 import reference
from flux_nf4.nf4.codec import NF4Weight, concatenate_rows
from flux_nf4.nf4.search import quantize_searched

T5 = "text_encoders.t5xxl.transformer."


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same tiny model as `folder` (in shards), `bare` and `all` .safetensors, not quantised."""
    root = tmp_path_factory.mktemp("models")
    save_diffusers_folder(root / "folder", max_shard_size="200KB")
    save_bare(root / "bare.safetensors", entries_of(root / "folder"))
    save_all_in_one(root / "all.safetensors", transformer=torch.bfloat16)
    return root


def entries_of(path):
    return dict(open_checkpoint(path).components["transformer"].entries)


def save_bare(path, entries):
    """A transformer under BFL's bare names, as its makers distribute it."""
    save_file({name: entry.contiguous() for name, entry in entries.items()}, path)
    return path


def expected(entries, quantize, *, prefix=PREFIX):
    """The tensors of a quantised transformer in a file, made in memory."""
    tensors = {}
    for name, entry in entries.items():
        if entry.dim() == 2:
            tensors.update(tensors_from_weight(prefix + name, quantize(entry)))
        else:
            dtype = torch.float32 if name.endswith(".scale") else torch.bfloat16
            tensors[prefix + name] = entry.to(dtype)
    return tensors


def flip_byte(path, name):
    """Change one byte of a tensor in a file."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + TensorFile(path).infos[name].start] ^= 1
    path.write_bytes(data)


def leftovers(folder):
    return [
        path.name for path in folder.iterdir() if "partial" in path.name or path.suffix == ".tmp"
    ]


# ---- the bytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block_size", [64, 128])
def test_every_byte_is_that_of_the_reference(flux, models, folder, dtype, nested, block_size):
    entries = cast(entries_of(models / "bare.safetensors"), dtype)
    save_bare(folder / "source.safetensors", entries)
    options = ("--layout", "transformer-only", "--block-size", str(block_size))
    ended = flux(
        *("quantize", "source.safetensors", "new.safetensors", *options),
        *("--format", "v1" if nested else "v2"),
    )
    tensors = expected(
        entries, lambda each: reference.quantize(each, block_size=block_size, nested=nested)
    )

    assert ended.exit_code == 0
    assert (folder / "new.safetensors").read_bytes() == save(tensors)


@pytest.mark.parametrize("source", ["folder", "bare.safetensors", "all.safetensors"])
def test_every_layout_gives_the_same_transformer(flux, models, folder, source):
    flux("quantize", str(models / source), "new.safetensors", "--layout", "transformer-only")
    tensors = expected(entries_of(models / "bare.safetensors"), reference.quantize)
    found = load_file(folder / "new.safetensors")

    assert found.keys() == tensors.keys()
    assert [name for name in found if not torch.equal(found[name], tensors[name])] == []


def test_searched_scales_are_those_of_the_search(flux, models, folder):
    entries = entries_of(models / "bare.safetensors")
    flux(
        *("quantize", str(models / "bare.safetensors"), "new.safetensors"),
        *("--layout", "transformer-only", "--scale", "search"),
    )

    assert (folder / "new.safetensors").read_bytes() == save(expected(entries, quantize_searched))


def test_an_fp8_source_is_widened_exactly_and_that_is_said(flux, models, folder):
    entries = cast(entries_of(models / "bare.safetensors"), torch.float8_e4m3fn)
    save_bare(folder / "source.safetensors", entries)
    ended = flux(
        *("quantize", "source.safetensors", "new.safetensors", "--layout", "transformer-only")
    )
    tensors = expected(entries, lambda each: reference.quantize(each.bfloat16()))

    assert (folder / "new.safetensors").read_bytes() == save(tensors)
    assert "the source is fp8" in ended.err


def test_an_all_in_one_file_has_t5_in_fp8_and_the_rest_as_it_is(flux, models, folder):
    flux("quantize", str(models / "folder"), "new.safetensors")
    found = open_checkpoint(folder / "new.safetensors").components
    source = open_checkpoint(models / "folder").components
    shared = source["t5"].entries["shared.weight"]

    assert torch.equal(
        found["t5"].entries["shared.weight"].float(), shared.to(torch.float8_e4m3fn).float()
    )
    for kind in ("clip", "vae"):
        for name, entry in source[kind].entries.items():
            assert torch.equal(found[kind].entries[name], entry), name


def test_t5_stays_as_it_is_where_that_is_asked_for(flux, models, folder):
    flux("quantize", str(models / "folder"), "new.safetensors", "--t5-dtype", "keep")

    assert TensorFile(folder / "new.safetensors").infos[f"{T5}shared.weight"].dtype_name == "BF16"


def test_a_value_that_fp8_cannot_hold_ends_the_run_and_leaves_nothing(flux, models, folder):
    tensors = load_file(models / "all.safetensors")
    tensors = {
        name: each.bfloat16() * 1e6 if name.startswith(T5) else each
        for name, each in tensors.items()
    }
    save_file(tensors, folder / "source.safetensors", metadata=TINY_FACTS.to_metadata())
    ended = flux("quantize", "source.safetensors", "new.safetensors")

    assert ended.exit_code == 3
    assert "cannot hold" in ended.err
    assert sorted(path.name for path in folder.iterdir()) == ["source.safetensors"]


def test_parts_are_put_together_while_quantising(flux, models, folder):
    flux("quantize", str(models / "folder"), "whole.safetensors")
    parts = ("--t5", "text_encoder_2"), ("--clip", "text_encoder"), ("--vae", "vae")
    options = [word for flag, name in parts for word in (flag, str(models / "folder" / name))]
    ended = flux(
        *("quantize", "new.safetensors", "--transformer", str(models / "bare.safetensors")),
        *options,
    )
    found, whole = (load_file(folder / f"{name}.safetensors") for name in ("new", "whole"))

    assert ended.exit_code == 0
    assert found.keys() == whole.keys()
    assert [name for name in found if not torch.equal(found[name], whole[name])] == []


# ---- Diffusers folders --------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v2", "v1"])
def test_a_folder_quantises_the_pieces_that_diffusers_has(flux, models, folder, version):
    flux(
        *("quantize", str(models / "bare.safetensors"), "new", "--layout", "diffusers"),
        *("--format", version),
    )
    qkv = entries_of(models / "bare.safetensors")["double_blocks.0.img_attn.qkv.weight"]
    nested = version == "v1"
    pieces = [reference.quantize(each, nested=nested) for each in qkv.chunk(3)]
    found = load_file(folder / "new/transformer/diffusion_pytorch_model.safetensors")

    for end, piece in zip(("q", "k", "v"), pieces, strict=True):
        name = f"transformer_blocks.0.attn.to_{end}.weight"
        for full_name, tensor in tensors_from_weight(name, piece).items():
            assert torch.equal(found[full_name], tensor), full_name


def test_our_reader_joins_the_folder_to_the_weights_of_the_file(flux, models, folder):
    flux("quantize", str(models / "folder"), "new", "--layout", "diffusers")
    flux("quantize", str(models / "folder"), "new.safetensors")
    ours, theirs = entries_of(folder / "new.safetensors"), entries_of(folder / "new")

    for name, weight in ours.items():
        if isinstance(weight, NF4Weight):
            joined = concatenate_rows([theirs[name]])
            assert torch.equal(joined.codes, weight.codes), name
            assert torch.equal(joined.absmax, weight.absmax), name


def test_the_folder_s_configuration_says_how_it_is_quantised(flux, models, folder):
    flux(*("quantize", str(models / "folder"), "new", "--layout", "diffusers", "--format", "v1"))
    config = json.loads((folder / "new/transformer/config.json").read_text())

    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is True


# ---- what is refused ----------------------------------------------------------------------------


def test_what_is_quantised_already_goes_to_convert(flux, models, folder):
    flux("quantize", str(models / "all.safetensors"), "new.safetensors")
    ended = flux("quantize", "new.safetensors", "again.safetensors")

    assert ended.exit_code == 2
    assert "quantised already (nf4 v2)" in ended.err
    assert "flux-nf4 convert" in ended.err


def test_what_an_all_in_one_file_lacks_is_named_with_two_ways_out(flux, models, folder):
    ended = flux("quantize", str(models / "bare.safetensors"), "new.safetensors")

    assert ended.exit_code == 2
    assert "needs t5, clip, vae too" in ended.err
    assert "--layout transformer-only" in ended.err
    assert "--t5 PATH --clip PATH --vae PATH" in ended.err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_the_source_is_never_the_destination(flux, models, folder, link):
    link(models / "all.safetensors", folder / "new.safetensors")
    before = (models / "all.safetensors").read_bytes()
    ended = flux("quantize", str(models / "all.safetensors"), "new.safetensors", "--force")

    assert ended.exit_code == 2
    assert "is the source itself" in ended.err
    assert (models / "all.safetensors").read_bytes() == before


def test_a_shard_of_the_source_is_never_the_destination(flux, models, folder):
    save_diffusers_folder(folder / "model", max_shard_size="200KB")
    shard = min((folder / "model/transformer").glob("*.safetensors"))
    ended = flux("quantize", "model", str(shard), "--force")

    assert (ended.exit_code, "is the source itself" in ended.err) == (2, True)


def test_what_exists_is_replaced_only_by_force(flux, models, folder):
    (folder / "new.safetensors").write_text("mine")
    source = str(models / "all.safetensors")
    refused = flux("quantize", source, "new.safetensors")

    assert (refused.exit_code, (folder / "new.safetensors").read_text()) == (2, "mine")
    assert flux("quantize", source, "new.safetensors", "--force").exit_code == 0
    assert open_checkpoint(folder / "new.safetensors").quantization == "nf4 v2"


def test_what_exists_is_still_there_after_a_run_that_fails(flux, models, folder):
    entries = entries_of(models / "bare.safetensors")
    entries["img_in.weight"] = entries["img_in.weight"].clone().fill_(float("nan"))
    save_bare(folder / "source.safetensors", entries)
    (folder / "new.safetensors").write_text("mine")
    ended = flux(
        *("quantize", "source.safetensors", "new.safetensors"),
        *("--layout", "transformer-only", "--force"),
    )

    assert ended.exit_code == 3
    assert "`img_in.weight`" in ended.err
    assert (folder / "new.safetensors").read_text() == "mine"
    assert leftovers(folder) == []


def test_a_truncated_source_is_refused_before_anything_is_written(flux, models, folder):
    data = (models / "all.safetensors").read_bytes()
    (folder / "source.safetensors").write_bytes(data[:-1000])
    ended = flux("quantize", "source.safetensors", "new.safetensors")

    assert ended.exit_code == 3
    assert [path.name for path in folder.iterdir()] == ["source.safetensors"]


def test_a_device_that_is_not_there_is_named(flux, models, folder):
    ended = flux("quantize", str(models / "all.safetensors"), "new.safetensors", "--device", "tpu")

    assert (ended.exit_code, "`tpu` is not a device" in ended.err) == (2, True)


# ---- what is said -------------------------------------------------------------------------------


def test_json_says_what_was_written(flux, models, folder):
    ended = flux("quantize", str(models / "all.safetensors"), "new.safetensors", "--json")
    said = json.loads(ended.out)

    assert said["bytes"] == (folder / "new.safetensors").stat().st_size
    assert said["tensors"] == len(TensorFile(folder / "new.safetensors").names)
    assert (said["kept_tensors"], said["device"], ended.err) == (0, "cpu", "")


def test_the_report_has_every_layer_and_the_plot_is_drawn(flux, models, folder):
    flux(
        *("quantize", str(models / "all.safetensors"), "new.safetensors"),
        *("--report", "report.json", "--plot", "report.svg"),
    )
    report = json.loads((folder / "report.json").read_text())
    matrices = [
        name for name, each in entries_of(models / "all.safetensors").items() if each.dim() == 2
    ]

    assert [layer["name"] for layer in report["layers"]] == matrices
    assert (folder / "report.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("option", "name"),
    [
        *(("--report", "no/report.json"), ("--plot", "no/a.svg"), ("--plot", "a.gif")),
        *(("--report", "."), ("--report", "new.safetensors")),
    ],
)
def test_where_a_report_cannot_go_is_said_before_the_work(flux, models, folder, option, name):
    ended = flux("quantize", str(models / "all.safetensors"), "new.safetensors", option, name)

    assert (ended.exit_code, list(folder.iterdir())) == (2, [])


def test_a_report_never_takes_the_place_of_its_source(flux, models, folder):
    source = folder / "all.safetensors"
    shutil.copy(models / "all.safetensors", source)
    ended = flux("quantize", source.name, "new.safetensors", "--report", str(source))

    assert (ended.exit_code, list(folder.iterdir())) == (2, [source])
    assert source.read_bytes() == (models / "all.safetensors").read_bytes()


def test_a_locked_folder_for_a_report_is_told_before_the_work(flux, models, folder, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    source = str(models / "all.safetensors")
    ended = flux("quantize", source, "new.safetensors", "--report", "report.json")

    assert (ended.exit_code, list(folder.iterdir())) == (7, [])


def test_without_a_terminal_every_tenth_is_a_line(flux, models, folder, monkeypatch):
    monkeypatch.setattr("flux_nf4.cli.byte_progress.PATIENCE_S", -1.0)
    ended = flux("quantize", str(models / "all.safetensors"), "new.safetensors")
    lines = [line for line in ended.err.splitlines() if line.startswith("quantising")]

    assert 5 <= len(lines) <= 10
    assert "tensors" in lines[-1]
    assert "left" in lines[-1]


def test_the_mode_comes_from_the_umask(flux, models, folder):
    previous = os.umask(0o027)
    try:
        flux("quantize", str(models / "all.safetensors"), "new.safetensors")
    finally:
        os.umask(previous)

    assert stat.S_IMODE((folder / "new.safetensors").stat().st_mode) == 0o640


# ---- the manifest -------------------------------------------------------------------------------


def test_verify_finds_every_hash_in_the_manifest(flux, models, folder):
    flux("quantize", str(models / "all.safetensors"), "new.safetensors")
    ended = flux("verify", "new.safetensors", "--sha256")

    assert ended.exit_code == 0
    assert "every hash is that of its manifest" in ended.out


def test_verify_names_the_tensor_of_a_flipped_byte(flux, models, folder):
    flux("quantize", str(models / "all.safetensors"), "new.safetensors")
    path, name = folder / "new.safetensors", f"{PREFIX}img_in.weight"
    flip_byte(path, name)
    ended = flux("verify", "new.safetensors", "--sha256")

    assert flux("verify", "new.safetensors").exit_code == 0  # any sixteen values are valid codes
    assert ended.exit_code == 3
    assert f"`{name}` does not have the sha256 of its manifest" in ended.out


def test_verify_hashes_every_file_of_a_folder(flux, models, folder):
    flux("quantize", str(models / "folder"), "new", "--layout", "diffusers")
    assert flux("verify", "new", "--sha256").exit_code == 0
    config = folder / "new/vae/config.json"
    config.write_text(config.read_text().replace("AutoencoderKL", "AutoencoderKX"))
    ended = flux("verify", "new", "--sha256")

    assert ended.exit_code == 3
    assert "vae/config.json" in ended.out


@pytest.mark.parametrize("text", ["", "[]", '{"format": "flux-nf4 manifest 1", "files": 3}', "{"])
def test_verify_refuses_what_is_no_manifest(flux, models, folder, text):
    flux("quantize", str(models / "all.safetensors"), "new.safetensors")
    (folder / "new.safetensors.manifest.json").write_text(text)
    ended = flux("verify", "new.safetensors")

    assert (ended.exit_code, "Traceback" in ended.err) == (3, False)


@pytest.mark.parametrize("name", ["../new.safetensors", "/etc/hostname", "a\\b", ""])
def test_a_manifest_does_not_reach_out_of_its_folder(flux, models, folder, name):
    flux("quantize", str(models / "folder"), "new", "--layout", "diffusers")
    path = folder / "new.manifest.json"
    values = json.loads(path.read_text())
    values["files"][name] = next(iter(values["files"].values()))
    path.write_text(json.dumps(values))
    ended = flux("verify", "new")

    assert (ended.exit_code, "impossible entry" in ended.out) == (3, True)


def test_the_manifest_says_source_options_and_licence(flux, models, folder):
    flux("quantize", str(models / "all.safetensors"), "new.safetensors", "--scale", "search")
    manifest = json.loads((folder / "new.safetensors.manifest.json").read_text())
    (file,) = manifest["files"].values()

    assert manifest["made_from"][0]["name"] == "all.safetensors"
    assert manifest["options"]["scale"] == "search"
    assert manifest["licence"] == TINY_FACTS.licence
    assert set(file["tensors"]) == set(TensorFile(folder / "new.safetensors").names)
