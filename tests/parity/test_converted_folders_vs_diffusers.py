"""Diffusers folders that `convert` writes, as those libraries read them."""

import json

import pytest
import torch
from checkpoints import save_all_in_one, save_all_in_one_v1
from safetensors.torch import load_file

from flux_nf4.cli import main
from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.nf4 import reference
from flux_nf4.pipeline.load import demo_path
from flux_nf4.pipeline.tokenizers import load_tokenizers

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def converted(source, folder, *options):
    assert main(["convert", str(source), str(folder), "--layout", "diffusers", *options]) == 0
    return folder


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    """The built-in demo model in bf16, as a Diffusers folder."""
    return converted(
        demo_path(), tmp_path_factory.mktemp("demo") / "folder", "--format", "bf16", "--quiet"
    )


@pytest.fixture(scope="module")
def pipeline(demo_folder):
    from diffusers import FluxPipeline

    return FluxPipeline.from_pretrained(demo_folder, torch_dtype=torch.bfloat16)


def test_diffusers_loads_the_folder_and_the_transformer_is_that_of_the_file(pipeline, demo_folder):
    theirs = pipeline.transformer.state_dict()
    written = load_file(demo_folder / WEIGHTS)

    assert theirs.keys() == written.keys()
    # The norms are float32 where bf16 would lose; this pipeline was asked to be bf16.
    assert [
        name for name in written if not torch.equal(theirs[name], written[name].bfloat16())
    ] == []


def test_the_expanded_weights_are_the_reference_decoder_s(pipeline):
    entries = open_checkpoint(demo_path()).components["transformer"].entries
    theirs = pipeline.transformer.state_dict()
    qkv = reference.dequantize(entries["double_blocks.0.img_attn.qkv.weight"])
    found = [theirs[f"transformer_blocks.0.attn.to_{x}.weight"] for x in "qkv"]

    assert torch.equal(torch.cat(found), qkv)


@pytest.mark.parametrize("kind", ["text_encoder", "text_encoder_2", "vae"])
def test_nothing_in_the_other_parts_is_left_at_random(pipeline, demo_folder, kind):
    part = getattr(pipeline, kind)
    (path,) = (demo_folder / kind).glob("*.safetensors")
    written = {name.removeprefix("text_model."): each for name, each in load_file(path).items()}
    theirs = {name.removeprefix("text_model."): each for name, each in part.state_dict().items()}
    copies = {"encoder.embed_tokens.weight", "embeddings.position_ids"}

    assert theirs.keys() - copies <= written.keys()
    assert [
        name
        for name in theirs.keys() - copies
        if not torch.equal(theirs[name], written[name].to(torch.bfloat16))
    ] == []


def test_the_tokenizers_give_the_same_numbers(pipeline, demo_folder):
    ours = load_tokenizers(open_checkpoint(demo_path()))
    prompt = "a red apple on a light blue background"
    t5 = pipeline.tokenizer_2(prompt, padding="max_length", max_length=32).input_ids
    clip = pipeline.tokenizer(prompt, padding="max_length", max_length=77).input_ids

    assert torch.tensor([t5]).equal(ours.encode_t5([prompt], 32)[0])
    assert torch.tensor([clip]).equal(ours.encode_clip([prompt]))


def test_the_pipeline_draws(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a red apple", height=64, width=64, num_inference_steps=1, max_sequence_length=32
    ).images[0]

    assert image.size == (64, 64)


@pytest.mark.parametrize(("save", "nested"), [(save_all_in_one, False), (save_all_in_one_v1, True)])
def test_bitsandbytes_decodes_the_pieces_to_the_rows_of_the_fused_weight(tmp_path, save, nested):
    from bitsandbytes.functional import QuantState, dequantize_4bit

    source = save(tmp_path / "a.safetensors")
    folder = converted(source, tmp_path / "folder", "--quiet")
    tensors = load_file(folder / WEIGHTS)
    entries = open_checkpoint(source).components["transformer"].entries
    whole = reference.dequantize(entries["single_blocks.1.linear1.weight"])
    pieces = []
    for end in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
        name = f"single_transformer_blocks.1.{end}.weight"
        stats = {key: each for key, each in tensors.items() if key.startswith(f"{name}.")}
        state = QuantState.from_dict(stats, device=torch.device("cpu"))
        pieces.append(dequantize_4bit(tensors[name], state))

    assert torch.equal(torch.cat(pieces), whole)


def test_the_quantization_config_is_as_diffusers_writes_it(tmp_path):
    from diffusers import BitsAndBytesConfig

    folder = converted(save_all_in_one(tmp_path / "a.safetensors"), tmp_path / "f", "--quiet")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    theirs = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.uint8,
    ).to_dict()

    assert config["quantization_config"] == theirs


def test_the_transformer_s_config_makes_a_model_with_the_file_s_names(tmp_path):
    from diffusers import FluxTransformer2DModel

    folder = converted(
        save_all_in_one(tmp_path / "a.safetensors", in_channels=128, num_double_blocks=2),
        tmp_path / "f",
        *("--format", "bf16", "--quiet"),
    )
    config = FluxTransformer2DModel.load_config(folder / "transformer")
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
    found = {name: each.shape for name, each in load_file(folder / WEIGHTS).items()}

    assert {name: each.shape for name, each in model.state_dict().items()} == found
