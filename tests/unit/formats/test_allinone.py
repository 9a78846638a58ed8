import pytest
import torch
from checkpoints import PREFIX, TINY_FACTS, canonical_entries, quantized

from flux_nf4.errors import DiskError, FormatError, InputError
from flux_nf4.formats.allinone import plan_all_in_one, write_all_in_one
from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.formats.tensorfile import TensorFile
from flux_nf4.nf4 import reference


@pytest.fixture(scope="module")
def components(bf16_folder):
    components = canonical_entries(bf16_folder)
    return components | {"transformer": quantized(components["transformer"])}


@pytest.fixture(scope="module")
def written(tmp_path_factory, components):
    path = tmp_path_factory.mktemp("written") / "model.safetensors"
    write_all_in_one(path, components, TINY_FACTS)
    return TensorFile(path)


def dtypes_of(file, prefix, end=""):
    return {
        info.dtype
        for name, info in file.infos.items()
        if name.startswith(prefix) and name.endswith(end)
    }


@pytest.mark.parametrize(
    ("prefix", "end", "dtype"),
    [
        (PREFIX, ".weight", torch.uint8),
        (PREFIX, ".weight.absmax", torch.float32),
        (PREFIX, ".weight.quant_map", torch.float32),
        (PREFIX, ".quant_state.bitsandbytes__nf4", torch.uint8),
        (PREFIX, ".bias", torch.bfloat16),
        (PREFIX, ".scale", torch.float32),
        ("text_encoders.t5xxl.transformer.", "", torch.float8_e4m3fn),
        ("text_encoders.clip_l.transformer.", "", torch.float16),
        ("vae.", "", torch.bfloat16),
    ],
)
def test_each_part_has_the_dtype_of_the_layout(written, prefix, end, dtype):
    assert dtypes_of(written, prefix, end) == {dtype}


def test_vae_attention_is_written_as_convolution(written):
    assert written.infos["vae.decoder.mid.attn_1.proj_out.weight"].shape == (16, 16, 1, 1)


def test_facts_go_into_the_metadata(written):
    assert written.metadata == TINY_FACTS.to_metadata()


def test_no_facts_give_no_metadata(tmp_path, components):
    write_all_in_one(tmp_path / "a.safetensors", components, None)
    assert TensorFile(tmp_path / "a.safetensors").metadata == {}


def test_what_was_written_reads_back(written, components):
    found = open_checkpoint(written.path).components["transformer"].entries
    for name, entry in components["transformer"].items():
        if isinstance(entry, torch.Tensor):
            assert torch.equal(found[name].float(), entry.float()), name
        else:
            assert torch.equal(reference.dequantize(found[name]), reference.dequantize(entry)), name


def test_writing_again_what_was_read_gives_the_same_bytes(tmp_path, written):
    again = tmp_path / "again.safetensors"
    checkpoint = open_checkpoint(written.path)
    write_all_in_one(again, canonical_entries(written.path), checkpoint.facts)
    assert again.read_bytes() == written.path.read_bytes()


def test_nested_weights_are_written_as_v2_that_decodes_alike(tmp_path, v1_file):
    path = tmp_path / "a.safetensors"
    write_all_in_one(path, canonical_entries(v1_file), None)
    checkpoint = open_checkpoint(path)
    before = canonical_entries(v1_file)["transformer"]["img_in.weight"]
    after = checkpoint.components["transformer"].entries["img_in.weight"]
    assert checkpoint.quantization == "nf4 v2"
    assert torch.equal(reference.dequantize(after), reference.dequantize(before))


def test_the_vae_is_written_in_float32_on_request(tmp_path, components):
    path = tmp_path / "a.safetensors"
    write_all_in_one(path, components, None, vae_dtype=torch.float32)
    assert dtypes_of(TensorFile(path), "vae.") == {torch.float32}


def test_logit_scales_are_written_on_request(tmp_path, components):
    path = tmp_path / "a.safetensors"
    write_all_in_one(path, components, None, logit_scales=True)
    names = [name for name in TensorFile(path).names if name.endswith("logit_scale")]
    assert len(names) == 2


def test_a_transformer_alone_can_be_written(tmp_path, components):
    path = tmp_path / "a.safetensors"
    write_all_in_one(path, {"transformer": components["transformer"]}, None)
    assert open_checkpoint(path).layout == "transformer-only"


def changed(components, kind, **entries):
    return dict(components) | {kind: dict(components[kind]) | entries}


@pytest.mark.parametrize("value", [450.0, -1e4, float("nan"), float("inf")])
def test_a_value_that_fp8_cannot_hold_is_refused_by_name(tmp_path, components, value):
    weight = components["t5"]["shared.weight"].clone()
    weight[0, 0] = value
    broken = changed(components, "t5", **{"shared.weight": weight})
    with pytest.raises(FormatError, match=r"`shared\.weight` holds .*at most 448"):
        write_all_in_one(tmp_path / "a.safetensors", broken, None)
    assert not list(tmp_path.iterdir())


def test_the_largest_fp8_value_is_kept(tmp_path, components):
    weight = components["t5"]["shared.weight"].clone()
    weight[0, 0] = 448.0
    path = tmp_path / "a.safetensors"
    write_all_in_one(path, changed(components, "t5", **{"shared.weight": weight}), None)
    assert open_checkpoint(path).components["t5"].entries["shared.weight"][0, 0].float() == 448


def test_a_value_that_fp16_cannot_hold_is_refused_by_name(tmp_path, components):
    name = "text_model.final_layer_norm.weight"
    broken = changed(components, "clip", **{name: components["clip"][name].float() + 1e6})
    with pytest.raises(FormatError, match=f"`{name}` holds"):
        write_all_in_one(tmp_path / "a.safetensors", broken, None)


def test_a_missing_name_is_refused(tmp_path, components):
    entries = dict(components["transformer"])
    del entries["img_in.bias"]
    with pytest.raises(FormatError, match=r"transformer part lacks: `img_in\.bias`"):
        write_all_in_one(tmp_path / "a.safetensors", {"transformer": entries}, None)


def test_an_unknown_name_is_refused(tmp_path, components):
    broken = changed(components, "vae", strange=torch.zeros(1))
    with pytest.raises(FormatError, match="`strange`"):
        write_all_in_one(tmp_path / "a.safetensors", broken, None)


def test_a_quantised_text_encoder_is_refused(tmp_path, components):
    weight = reference.quantize(components["t5"]["shared.weight"])
    with pytest.raises(FormatError, match="only the transformer is"):
        plan_all_in_one(changed(components, "t5", **{"shared.weight": weight}))


def test_another_vae_dtype_is_an_input_error(components):
    with pytest.raises(InputError, match="vae_dtype must be bfloat16 or float32"):
        plan_all_in_one(components, vae_dtype=torch.float16)


def test_nothing_to_write_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no component"):
        write_all_in_one(tmp_path / "a.safetensors", {}, None)


def test_a_missing_folder_is_a_disk_error(tmp_path, components):
    with pytest.raises(DiskError):
        write_all_in_one(tmp_path / "no" / "a.safetensors", components, None)


def test_a_file_can_be_rewritten_in_its_own_place(tmp_path, written):
    path = tmp_path / "a.safetensors"
    path.write_bytes(written.path.read_bytes())
    write_all_in_one(path, canonical_entries(path), TINY_FACTS)
    assert path.read_bytes() == written.path.read_bytes()
