import pytest
import torch
from safetensors.torch import save_file

from flux_nf4.errors import FormatError
from flux_nf4.formats.canonical import StoredTensor, list_names, read_component
from flux_nf4.formats.keymap import clip_table, t5_table, transformer_table, vae_table
from flux_nf4.formats.tensorfile import TensorFile


def read(tmp_path, kind, tensors):
    path = tmp_path / "part.safetensors"
    save_file(tensors, path)
    file = TensorFile(path)
    return read_component(kind, {name: StoredTensor(file, name) for name in file.names}, path)


def tensors_of(table, **replaced):
    tensors = {name: torch.full((4, 2), float(i)) for i, name in enumerate(table.inverse())}
    return tensors | replaced


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        ("transformer", transformer_table(1, 1, "bfl")),
        ("transformer", transformer_table(2, 1, "diffusers")),
        ("t5", t5_table(2)),
        ("clip", clip_table(2)),
        ("clip", clip_table(2, flattened=True)),
        ("vae", vae_table(2, 1, "bfl")),
        ("vae", vae_table(2, 1, "diffusers")),
    ],
)
def test_every_name_of_a_table_becomes_canonical(tmp_path, kind, table):
    assert read(tmp_path, kind, tensors_of(table)).entries.keys() == table.names.keys()


def test_no_tensor_is_lost_on_the_way(tmp_path):
    table = transformer_table(1, 1, "diffusers")
    entries = read(tmp_path, "transformer", tensors_of(table)).entries
    found = {float(value) for name in entries for value in entries[name].unique()}
    assert found == {float(i) for i in range(len(table.inverse()))}


@pytest.mark.parametrize("junk", ["logit_scale", "embeddings.position_ids"])
def test_junk_of_clip_is_ignored_by_name(tmp_path, junk):
    tensors = tensors_of(clip_table(1, flattened=True)) | {junk: torch.zeros(1)}
    assert junk not in read(tmp_path, "clip", tensors).entries


def test_junk_of_one_part_is_unknown_to_another(tmp_path):
    tensors = tensors_of(vae_table(1, 1)) | {"logit_scale": torch.zeros(1)}
    with pytest.raises(FormatError, match="no FLUX vae has: `logit_scale`"):
        read(tmp_path, "vae", tensors)


def test_a_copy_of_the_t5_embedding_is_dropped(tmp_path):
    tensors = tensors_of(t5_table(1))
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    assert "encoder.embed_tokens.weight" not in read(tmp_path, "t5", tensors).entries


def test_the_t5_embedding_is_found_under_its_other_name(tmp_path):
    tensors = tensors_of(t5_table(1))
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    assert "shared.weight" in read(tmp_path, "t5", tensors).entries


@pytest.mark.parametrize("other", [torch.ones(4, 2), torch.zeros(3, 2), torch.zeros(4, 2).half()])
def test_a_t5_embedding_that_only_claims_to_be_a_copy_is_refused(tmp_path, other):
    tensors = tensors_of(t5_table(1), **{"shared.weight": torch.zeros(4, 2)})
    with pytest.raises(FormatError, match=r"differs from `shared\.weight`"):
        read(tmp_path, "t5", tensors | {"encoder.embed_tokens.weight": other})


def test_a_missing_name_is_listed(tmp_path):
    tensors = without(tensors_of(transformer_table(1, 1, "bfl")), "img_in.bias")
    with pytest.raises(FormatError, match=r"the transformer part lacks `img_in\.bias`\n"):
        read(tmp_path, "transformer", tensors)


def test_a_missing_piece_is_listed_under_the_files_own_name(tmp_path):
    name = "transformer_blocks.0.attn.to_k.weight"
    tensors = without(tensors_of(transformer_table(1, 1, "diffusers")), name)
    with pytest.raises(FormatError, match=f"lacks `{name}`"):
        read(tmp_path, "transformer", tensors)


def test_a_missing_block_in_the_middle_is_found(tmp_path):
    tensors = tensors_of(transformer_table(3, 1, "bfl"))
    tensors = {n: t for n, t in tensors.items() if not n.startswith("double_blocks.1.")}
    with pytest.raises(FormatError, match=r"double_blocks\.2\.img_attn"):
        read(tmp_path, "transformer", tensors)


def test_an_unknown_name_is_listed(tmp_path):
    tensors = tensors_of(transformer_table(1, 1)) | {"strange": torch.zeros(1)}
    with pytest.raises(FormatError, match="no FLUX transformer has: `strange`"):
        read(tmp_path, "transformer", tensors)


def test_two_dialects_in_one_part_are_refused(tmp_path):
    tensors = tensors_of(transformer_table(1, 1, "bfl"))
    tensors |= tensors_of(transformer_table(1, 1, "diffusers"))
    with pytest.raises(FormatError, match="no FLUX transformer has"):
        read(tmp_path, "transformer", tensors)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("double_blocks.0.img_attn.qkv.lora_A.weight", "LoRA"),
        ("double_blocks.0.img_attn.qkv.weight.SCB", "8 bits"),
        ("double_blocks.0.img_attn.qkv.scale_weight", "fp8 with separate scales"),
        ("double_blocks.0.img_attn.qkv.weight_scale_2", "NVFP4"),
        ("transformer_blocks.0.qkv_proj.qweight", "SVDQuant"),
        ("controlnet_blocks.0.weight", "ControlNet"),
        ("input_blocks.0.0.weight", "Stable Diffusion"),
        ("double_stream_modulation_img.lin.weight", "FLUX.2"),
        ("distilled_guidance_layer.in_proj.weight", "Chroma"),
    ],
)
def test_a_telling_name_gives_a_telling_hint(tmp_path, name, hint):
    with pytest.raises(FormatError) as caught:
        read(tmp_path, "transformer", {name: torch.zeros(1)})
    assert hint in (caught.value.hint or "")


def test_at_most_eight_names_are_listed():
    listed = list_names(f"n{i:02}" for i in range(20))
    assert listed.count("`") == 16
    assert listed.endswith("`n07` and 12 more")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float64, torch.bool])
def test_a_weight_of_integers_without_statistics_is_refused(tmp_path, dtype):
    tensors = tensors_of(t5_table(1), **{"shared.weight": torch.zeros(4, 2, dtype=dtype)})
    with pytest.raises(FormatError, match="has no quantisation statistics"):
        read(tmp_path, "t5", tensors)


def test_statistics_without_their_weight_are_refused(tmp_path):
    tensors = tensors_of(transformer_table(1, 1)) | {"no.weight.absmax": torch.zeros(1)}
    with pytest.raises(FormatError, match=r"without their weight: `no\.weight`"):
        read(tmp_path, "transformer", tensors)


def test_a_quantised_clip_is_refused_clearly(tmp_path):
    tensors = tensors_of(clip_table(1))
    tensors |= {"text_model.encoder.layers.0.mlp.fc1.weight.absmax": torch.zeros(1)}
    with pytest.raises(FormatError, match="read for the transformer and T5 only") as caught:
        read(tmp_path, "clip", tensors)
    assert caught.value.hint == "use that part in bf16, fp16 or fp8"


def test_vae_attention_by_convolution_becomes_linear(tmp_path):
    name = "encoder.mid.attn_1.q.weight"
    tensors = tensors_of(vae_table(1, 1), **{name: torch.arange(16.0).view(4, 4, 1, 1)})
    found = read(tmp_path, "vae", tensors).entries["encoder.mid_block.attentions.0.to_q.weight"]
    assert torch.equal(found, torch.arange(16.0).view(4, 4))


def test_bfl_halves_are_not_swapped(tmp_path):
    name = "final_layer.adaLN_modulation.1.bias"
    tensors = tensors_of(transformer_table(1, 1, "bfl"), **{name: torch.arange(4.0)})
    assert read(tmp_path, "transformer", tensors).entries[name].tolist() == [0, 1, 2, 3]


def test_diffusers_halves_are_swapped(tmp_path):
    tensors = tensors_of(transformer_table(1, 1), **{"norm_out.linear.bias": torch.arange(4.0)})
    entries = read(tmp_path, "transformer", tensors).entries
    assert entries["final_layer.adaLN_modulation.1.bias"].tolist() == [2, 3, 0, 1]
