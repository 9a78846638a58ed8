import os
import shutil

import pytest
import torch
from checkpoints import (
    TINY_FACTS,
    canonical_entries,
    quantized,
    save_all_in_one,
    save_diffusers_folder,
    save_transformer_only,
)
from safetensors.torch import load_file, save_file

from flux_nf4.errors import FormatError, InputError, ModelNotFoundError
from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.formats.facts import FLUX_1_DEV, FLUX_1_SCHNELL
from flux_nf4.nf4 import reference


@pytest.fixture(scope="module")
def entries(bf16_folder):
    """A transformer's entries, in bf16."""
    return canonical_entries(bf16_folder)["transformer"]


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    folder = save_diffusers_folder(tmp_path_factory.mktemp("schnell"), guidance=False)
    return canonical_entries(folder)["transformer"]


def values(entry):
    return entry if isinstance(entry, torch.Tensor) else reference.dequantize(entry)


def test_all_layouts_have_the_same_names(bf16_folder, v1_file, v2_file):
    names = {
        kind: component.entries.keys()
        for kind, component in open_checkpoint(bf16_folder).components.items()
    }
    for path in (v1_file, v2_file):
        found = open_checkpoint(path).components
        assert {kind: component.entries.keys() for kind, component in found.items()} == names


def test_all_layouts_have_the_same_shapes(bf16_folder, v1_file, v2_file):
    folder = open_checkpoint(bf16_folder).components
    for path in (v1_file, v2_file):
        for kind, component in open_checkpoint(path).components.items():
            for name, entry in component.entries.items():
                assert tuple(entry.shape) == tuple(folder[kind].entries[name].shape), name


def test_nf4_decodes_to_the_quantised_originals(entries, v1_file, v2_file):
    for path, nested in ((v1_file, True), (v2_file, False)):
        found = open_checkpoint(path).components["transformer"].entries
        expected = quantized(entries, nested=nested)
        for name in entries:
            assert torch.equal(values(found[name]).float(), values(expected[name]).float()), name


@pytest.mark.parametrize(
    ("which", "layout"), [("v1_file", "all-in-one"), ("bf16_folder", "diffusers")]
)
def test_the_layout_is_told(request, which, layout):
    assert open_checkpoint(request.getfixturevalue(which)).layout == layout


@pytest.mark.parametrize(
    ("which", "quantization"),
    [("v1_file", "nf4 v1"), ("v2_file", "nf4 v2"), ("bf16_folder", "bf16")],
)
def test_the_quantisation_is_told(request, which, quantization):
    assert open_checkpoint(request.getfixturevalue(which)).quantization == quantization


@pytest.mark.parametrize(
    ("transformer", "quantization"),
    [
        (torch.bfloat16, "bf16"),
        (torch.float16, "fp16"),
        (torch.float32, "fp32"),
        (torch.float8_e4m3fn, "fp8"),
        (torch.float8_e5m2, "fp8 e5m2"),
        ("fp4", "fp4"),
    ],
)
def test_an_all_in_one_file_with_another_transformer_is_read(tmp_path, transformer, quantization):
    path = save_all_in_one(tmp_path / "model.safetensors", transformer=transformer)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.layout, checkpoint.missing) == ("all-in-one", ())
    assert checkpoint.quantization == quantization


def test_a_mixed_transformer_names_its_forms_the_most_bytes_first(tmp_path, entries):
    mixed = quantized(entries)
    mixed["img_in.weight"] = entries["img_in.weight"].to(torch.float8_e4m3fn)
    path = save_transformer_only(tmp_path / "a.safetensors", mixed)
    assert open_checkpoint(path).quantization == "mixed: nf4 v2, fp8"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_transformer_alone_is_read_with_and_without_prefix(tmp_path, entries, prefix):
    path = save_transformer_only(tmp_path / "a.safetensors", quantized(entries), prefix=prefix)
    checkpoint = open_checkpoint(path)
    assert checkpoint.layout == "transformer-only"
    assert checkpoint.missing == ("t5", "clip", "vae")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_transformer_under_diffusers_names_is_read(tmp_path, bf16_folder, entries, prefix):
    source = bf16_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {prefix + name: tensor for name, tensor in load_file(source).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    found = open_checkpoint(tmp_path / "a.safetensors").components["transformer"].entries
    assert all(torch.equal(found[name], entries[name]) for name in entries)


def test_the_transformer_folder_of_a_pipeline_is_read(bf16_folder, entries):
    checkpoint = open_checkpoint(bf16_folder / "transformer")
    assert checkpoint.layout == "transformer-only"
    assert checkpoint.components["transformer"].entries.keys() == entries.keys()


def test_a_vae_under_its_other_prefix_is_read(tmp_path, v2_file):
    tensors = {
        f"first_stage_model.{name[4:]}" if name.startswith("vae.") else name: tensor
        for name, tensor in load_file(v2_file).items()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    assert open_checkpoint(tmp_path / "a.safetensors").missing == ()


def test_known_junk_is_ignored(tmp_path, v2_file):
    tensors = load_file(v2_file)
    for name in ("t5xxl.logit_scale", "clip_l.logit_scale"):
        tensors[f"text_encoders.{name}"] = torch.tensor(1.0)
    position_ids = "text_encoders.clip_l.transformer.text_model.embeddings.position_ids"
    tensors[position_ids] = torch.arange(77)
    save_file(tensors, tmp_path / "a.safetensors")
    assert open_checkpoint(tmp_path / "a.safetensors").missing == ()


@pytest.mark.parametrize("name", ["strange", "model.diffusion_model.strange", "vae.strange"])
def test_an_unknown_name_is_refused_under_its_full_name(tmp_path, v2_file, name):
    save_file(load_file(v2_file) | {name: torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=f"`{name}`"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_one_tensor_under_two_prefixes_is_refused(tmp_path, v2_file):
    tensors = load_file(v2_file)
    tensors["first_stage_model.decoder.conv_in.bias"] = torch.zeros(1)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="one tensor under two names"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_a_file_without_a_transformer_says_what_it_holds(bf16_folder):
    with pytest.raises(FormatError, match=r"no FLUX transformer has: `decoder\.") as caught:
        open_checkpoint(bf16_folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert caught.value.hint == "this looks like a VAE alone; the transformer is another file"


def test_an_empty_file_is_refused(tmp_path):
    save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="holds no FLUX transformer: it is empty"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_facts_in_the_metadata_count(v2_file):
    assert open_checkpoint(v2_file).facts == TINY_FACTS


def test_a_file_without_facts_gets_those_of_dev(v1_file):
    assert open_checkpoint(v1_file).facts == FLUX_1_DEV


def test_a_file_without_facts_and_guidance_gets_those_of_schnell(tmp_path, schnell):
    path = save_transformer_only(tmp_path / "a.safetensors", schnell)
    assert open_checkpoint(path).facts == FLUX_1_SCHNELL


def test_facts_that_lie_are_refused_with_the_files_name(tmp_path, entries):
    path = tmp_path / "a.safetensors"
    tensors = {name: entry.contiguous() for name, entry in entries.items()}
    save_file(tensors, path, metadata={"flux_nf4": "{"})
    with pytest.raises(FormatError, match=r"a\.safetensors`: metadata"):
        open_checkpoint(path)


def test_variant_tells_dev_from_schnell(tmp_path, entries, schnell):
    for name, transformer in (("dev", entries), ("schnell", schnell)):
        path = save_transformer_only(tmp_path / f"{name}.safetensors", quantized(transformer))
        assert open_checkpoint(path).variant == name


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize(
    ("num_channels", "variant"),
    [(384, "fill"), (128, "canny/depth"), (192, "unknown (192 input channels)")],
)
def test_variant_is_told_by_the_weights_shape_not_its_bytes(
    tmp_path, entries, num_channels, variant, nf4
):
    weight = torch.randn(128, num_channels, generator=torch.Generator().manual_seed(0))
    changed = dict(entries) | {"img_in.weight": weight.bfloat16()}
    path = save_transformer_only(tmp_path / "a.safetensors", quantized(changed) if nf4 else changed)
    assert open_checkpoint(path).variant == variant


def test_a_folder_with_one_file_is_that_file(tmp_path, v2_file):
    shutil.copy(v2_file, tmp_path / "model.safetensors")
    (tmp_path / "README.md").write_text("a model")
    assert open_checkpoint(tmp_path).path == tmp_path / "model.safetensors"


def test_a_folder_with_two_files_names_them(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"`a\.safetensors`, `b\.safetensors`"):
        open_checkpoint(tmp_path)


def test_an_empty_folder_is_not_a_model(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"holds no \.safetensors file") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.hint is not None


def test_a_folder_of_other_formats_names_them(tmp_path):
    (tmp_path / "flux.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"only `flux\.gguf`"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["no", "black-forest-labs/FLUX.1-dev", "no/no.safetensors"])
def test_a_missing_path_is_not_found_with_a_hint(tmp_path, name):
    with pytest.raises(ModelNotFoundError, match="there is no model at") as caught:
        open_checkpoint(tmp_path / name)
    assert caught.value.hint is not None


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_what_cannot_be_a_path_is_an_input_error(path):
    with pytest.raises(InputError, match="is no path"):
        open_checkpoint(path)


def test_a_path_too_long_is_an_error_of_ours(tmp_path):
    with pytest.raises(ModelNotFoundError):
        open_checkpoint(tmp_path / ("a" * 5000))


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_a_device_does_not_hang(path):
    with pytest.raises(InputError, match="not a regular file"):
        open_checkpoint(path)


def test_a_named_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        open_checkpoint(tmp_path / "pipe")


def test_single_files_in_a_complete_folder_are_noted(tmp_path, bf16_folder):
    folder = shutil.copytree(bf16_folder, tmp_path / "model")
    (folder / "flux1-dev.safetensors").write_bytes(b"not looked at")
    assert "`flux1-dev.safetensors`" in open_checkpoint(folder).notes[0]


def test_a_folder_that_lacks_parts_lists_them(tmp_path, bf16_folder):
    folder = shutil.copytree(bf16_folder, tmp_path / "model")
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "transformer")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.missing == ("transformer", "vae")
    assert (checkpoint.quantization, checkpoint.variant) == ("none", "none")


def test_a_transformer_alone_says_what_an_image_needs(tmp_path, entries):
    path = save_transformer_only(tmp_path / "a.safetensors", entries)
    with pytest.raises(ModelNotFoundError) as caught:
        open_checkpoint(path).require_complete()
    assert caught.value.message == (
        f"`{path}` holds only the transformer; an image also needs "
        "the T5 text encoder, the CLIP text encoder and the VAE"
    )


def test_a_complete_checkpoint_passes(v2_file):
    checkpoint = open_checkpoint(v2_file)
    checkpoint.require_complete()
    assert checkpoint.missing == ()


def test_the_summary_adds_up_to_the_data_of_the_file(v2_file):
    components = open_checkpoint(v2_file).components.values()
    # The codes and absmax are counted, their tables and JSON texts are not.
    small = sum(
        tensor.nbytes
        for name, tensor in load_file(v2_file).items()
        if "quant_map" in name or "quant_state" in name
    )
    data = sum(tensor.nbytes for tensor in load_file(v2_file).values())
    assert sum(component.num_bytes for component in components) == data - small


def test_the_summary_tells_the_parts_apart(v2_file):
    components = open_checkpoint(v2_file).components
    assert {kind: next(iter(part.summary())) for kind, part in components.items()} == {
        "transformer": "nf4 v2",
        "t5": "fp8",
        "clip": "fp16",
        "vae": "bf16",
    }


def test_opening_copies_nothing(tmp_path, entries):
    path = save_transformer_only(tmp_path / "a.safetensors", entries)
    found = open_checkpoint(path).components["transformer"].entries
    # Backed by the file: the same address at every reading.
    assert found["img_in.weight"].data_ptr() == found["img_in.weight"].data_ptr()
