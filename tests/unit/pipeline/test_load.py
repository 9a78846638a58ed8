import dataclasses

import pytest
import torch
from checkpoints import (
    canonical_entries,
    save_all_in_one,
    save_diffusers_folder,
    save_transformer_only,
)
from tiny_pipeline import save_tiny_folder, tiny_clip_tokenizer, tiny_t5_tokenizer

from flux_nf4.errors import FormatError, InputError, ModelNotFoundError
from flux_nf4.formats.facts import FLUX_1_DEV
from flux_nf4.pipeline import load, tokenizers
from flux_nf4.pipeline.convert import QuantizationWish
from flux_nf4.pipeline.load import (
    LoadSettings,
    check_facts,
    default_dtype,
    load_model,
    resolve_device,
)

CPU = LoadSettings(device="cpu", dtype=torch.float32)


@pytest.fixture
def tiny_tokenizers_packaged(monkeypatch):
    """The tiny vocabularies under every packaged name, as a tiny all-in-one file needs them."""
    made = {"t5": tiny_t5_tokenizer, "clip": tiny_clip_tokenizer}
    monkeypatch.setattr(tokenizers, "packaged_tokenizer", lambda name, kind: made[kind]())


def test_a_diffusers_folder_loads_with_its_own_tokenizers(tiny_model):
    assert tiny_model.tokenizers.t5.get_vocab_size() == tiny_t5_tokenizer().get_vocab_size()
    assert tiny_model.variant == "dev"
    assert tiny_model.embeds_guidance


def test_an_all_in_one_file_loads(tmp_path, tiny_tokenizers_packaged):
    model = load_model(save_all_in_one(tmp_path / "tiny.safetensors"), CPU)
    assert model.quantization == "nf4 v2"
    assert model.facts.name == "tiny"


def test_a_wish_quantises_plain_weights_while_loading(tiny_folder):
    wish = QuantizationWish(quant_type="nf4", double_quant=False)
    model = load_model(tiny_folder, dataclasses.replace(CPU, quantization=wish))
    assert model.quantization == "nf4 v2"


def test_schnell_embeds_no_guidance(tiny_schnell):
    assert not tiny_schnell.embeds_guidance
    assert tiny_schnell.variant == "schnell"


@pytest.mark.parametrize("limit", [{"vram": 2**30}, {"ram": 2**30}])
def test_a_limit_that_a_cpu_does_not_heed_is_told(tiny_folder, limit):
    model = load_model(tiny_folder, dataclasses.replace(CPU, **limit))

    assert "limits of memory are not used: the device is `cpu`" in model.notes


def test_missing_parts_are_named(tmp_path):
    entries = canonical_entries(save_diffusers_folder(tmp_path / "source"))["transformer"]
    path = save_transformer_only(tmp_path / "only.safetensors", entries)
    with pytest.raises(
        ModelNotFoundError, match="only the transformer; an image also needs the T5"
    ):
        load_model(path, CPU)


def test_nothing_at_the_path_is_said(tmp_path):
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        load_model(tmp_path / "nowhere", CPU)


def test_a_variant_that_edits_images_is_refused(tmp_path):
    folder = save_diffusers_folder(tmp_path / "fill", in_channels=384)
    with pytest.raises(InputError, match=r"FLUX\.1 fill, which needs an input image"):
        load_model(folder, CPU)


def test_a_tokenizer_beyond_the_embedding_is_refused(tmp_path):
    # No tokenizers in the folder: the packaged ones of FLUX.1 have 32,100 tokens.
    folder = save_diffusers_folder(tmp_path / "model")
    with pytest.raises(FormatError, match="the t5 tokenizer knows 32100 tokens"):
        load_model(folder, CPU)


def test_a_folder_with_a_damaged_tokenizer_names_the_file(tmp_path):
    folder = save_tiny_folder(tmp_path / "model")
    (folder / "tokenizer_2" / "tokenizer.json").write_text("{")
    with pytest.raises(FormatError, match=r"tokenizer_2/tokenizer\.json"):
        load_model(folder, CPU)


def test_the_demo_model_is_inside_the_package():
    model = load_model(None, CPU)
    assert (model.facts.name, model.quantization) == ("flux-demo", "nf4 v2")


def test_a_package_without_demo_model_says_so(monkeypatch):
    monkeypatch.setattr(load, "DEMO_FILE", "not-shipped.safetensors")
    with pytest.raises(ModelNotFoundError, match="demo model is missing"):
        load_model(None, CPU)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cpu:0:0"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(InputError, match=f"`{name}` is not a device"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["cuda:99", "meta", "xpu:77"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(InputError, match="no device"):
        resolve_device(name)


def test_without_cuda_auto_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_a_cpu_computes_in_bfloat16_only_with_amx(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(load, "_cpu_capabilities", lambda: capabilities)
    assert default_dtype(torch.device("cpu")) == dtype


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)]
)
def test_a_gpu_before_ampere_computes_in_float32(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert default_dtype(torch.device("cuda")) == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(InputError, match="computes in bfloat16 or float32, not in"):
        LoadSettings(dtype=dtype)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("default_size", 100),
        ("default_size", 10**9),
        ("max_sequence_length", 0),
        ("vae_scaling_factor", 0.0),
        ("vae_shift_factor", float("nan")),
        ("max_shift", 1e9),
        ("shift", -1.0),
        ("max_image_seq_len", 256),
    ],
)
def test_facts_that_cannot_be_computed_with_are_refused(name, value):
    with pytest.raises(FormatError, match=f"`{name}`"):
        check_facts(dataclasses.replace(FLUX_1_DEV, **{name: value}))


def test_the_facts_of_flux_are_accepted():
    assert check_facts(FLUX_1_DEV) is None
