import json
import shutil

import pytest
import torch
from checkpoints import save_diffusers_folder, save_quantized_diffusers_folder
from safetensors.torch import load_file, save_file

from flux_nf4.errors import FormatError, InputError, ModelNotFoundError
from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.formats.folder import read_facts, read_part, tokenizer_folders

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(bf16_folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(bf16_folder, tmp_path / "model")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return save_diffusers_folder(tmp_path_factory.mktemp("sharded"), max_shard_size=300_000)


@pytest.fixture
def damaged(sharded, tmp_path):
    """A copy of the sharded transformer, and its index."""
    part = shutil.copytree(sharded / "transformer", tmp_path / "transformer")
    return part, part / f"{WEIGHTS}.index.json"


def edit(path, **changes):
    values = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values | changes))


def facts(folder, **options):
    return read_facts(folder, **{"has_guidance": True, "hidden_size": 128} | options)


def test_shards_hold_what_one_file_holds(sharded, bf16_folder):
    whole = read_part("transformer", bf16_folder / "transformer").entries
    split = read_part("transformer", sharded / "transformer").entries
    assert all(torch.equal(split[name], whole[name]) for name in whole)


def test_a_part_in_shards_has_its_folder_as_source(sharded):
    assert read_part("transformer", sharded / "transformer").source == sharded / "transformer"


def test_a_missing_shard_is_named(damaged):
    part, _ = damaged
    shard = sorted(part.glob("*-of-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelNotFoundError, match=shard.name):
        read_part("transformer", part)


def test_a_shard_that_lacks_what_the_index_says_is_refused(damaged):
    part, _ = damaged
    shard = sorted(part.glob("*-of-*.safetensors"))[0]
    tensors = load_file(shard)
    name = next(iter(tensors))
    save_file({n: t for n, t in tensors.items() if n != name}, shard)
    with pytest.raises(FormatError, match="not hold what the index"):
        read_part("transformer", part)


def test_a_tensor_that_the_index_does_not_know_is_refused(damaged):
    part, _ = damaged
    shard = sorted(part.glob("*-of-*.safetensors"))[0]
    save_file(load_file(shard) | {"more": torch.zeros(1)}, shard)
    with pytest.raises(FormatError, match="`more`"):
        read_part("transformer", part)


@pytest.mark.parametrize(
    "shard",
    ["../a.safetensors", "/etc/passwd", "a/b.safetensors", "a.bin", 1, None, "a.safetensors\n"],
)
def test_an_index_may_not_reach_out_of_its_folder(damaged, shard):
    part, index = damaged
    edit(index, weight_map={"x_embedder.weight": shard})
    with pytest.raises(FormatError, match="names the shard"):
        read_part("transformer", part)


@pytest.mark.parametrize("weight_map", [None, {}, [], "a"])
def test_an_index_without_a_map_is_refused(damaged, weight_map):
    part, index = damaged
    edit(index, weight_map=weight_map)
    with pytest.raises(FormatError, match="holds no `weight_map`"):
        read_part("transformer", part)


def test_a_lone_variant_is_read(folder):
    path = folder / "vae" / WEIGHTS
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert open_checkpoint(folder).missing == ()


def test_a_variant_beside_the_standard_file_is_left_alone(folder):
    path = folder / "vae" / WEIGHTS
    path.with_name("diffusion_pytorch_model.fp16.safetensors").write_bytes(b"damaged")
    assert open_checkpoint(folder).components["vae"].source == path


def test_two_sets_of_weights_are_named(folder):
    path = folder / "vae" / WEIGHTS
    shutil.copy(path, path.with_name("model.safetensors"))
    with pytest.raises(InputError, match=r"`diffusion_pytorch_model\.safetensors`, `model"):
        open_checkpoint(folder)


def test_pickled_weights_are_not_opened(folder):
    path = folder / "text_encoder" / "model.safetensors"
    path.rename(path.with_name("pytorch_model.bin"))
    with pytest.raises(ModelNotFoundError) as caught:
        open_checkpoint(folder)
    assert "`pytorch_model.bin` can run code when opened" in (caught.value.hint or "")


def test_an_empty_part_says_that_the_download_is_incomplete(folder):
    (folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError) as caught:
        open_checkpoint(folder)
    assert caught.value.hint == "the download is incomplete: get it again"


@pytest.mark.parametrize("name", ["Flux2Pipeline", "StableDiffusionPipeline", None, 3])
def test_another_pipeline_is_refused(folder, name):
    edit(folder / "model_index.json", _class_name=name)
    with pytest.raises(FormatError, match=r"not a FLUX\.1 pipeline"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["FluxPipeline", "FluxFillPipeline", "FluxKontextPipeline"])
def test_the_relatives_of_the_pipeline_are_accepted(folder, name):
    edit(folder / "model_index.json", _class_name=name)
    assert open_checkpoint(folder).layout == "diffusers"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "'bitsandbytes' in 8 bits"),
        ({"quant_method": "torchao"}, "'torchao'"),
        ({"quant_method": "gguf"}, "'gguf'"),
        ({}, "None"),
        ([], "must be an object"),
        (
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_storage": "bfloat16",
            },
            "must be 'uint8', got 'bfloat16'",
        ),
    ],
    ids=str,
)
def test_another_quantisation_is_refused(folder, config, message):
    edit(folder / "transformer" / "config.json", quantization_config=config)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(folder)


def test_a_quantised_clip_is_refused(folder):
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit(folder / "text_encoder" / "config.json", quantization_config=config)
    with pytest.raises(FormatError, match="clip part is quantised"):
        open_checkpoint(folder)


@pytest.mark.parametrize("nested", [False, True])
def test_a_quantised_folder_says_which_version_it_is(tmp_path, nested):
    folder = save_quantized_diffusers_folder(tmp_path / "model", nested=nested)
    assert open_checkpoint(folder).quantization == ("nf4 v1" if nested else "nf4 v2")


def test_a_folder_quantised_in_part_says_so(tmp_path):
    folder = save_quantized_diffusers_folder(tmp_path / "model", skip=("proj_out.weight",))
    assert open_checkpoint(folder).quantization == "mixed: nf4 v2, bf16"


def test_the_pieces_of_a_fused_matrix_must_be_stored_alike(tmp_path):
    skip = ("transformer_blocks.0.attn.to_k.weight",)
    folder = save_quantized_diffusers_folder(tmp_path / "model", skip=skip)
    with pytest.raises(FormatError, match=r"parts of `double_blocks\.0\.img_attn\.qkv\.weight`"):
        open_checkpoint(folder)


def test_facts_are_read_off_the_configurations(folder):
    edit(folder / "scheduler" / "scheduler_config.json", shift=2.5, base_shift=0.25, max_shift=2)
    found = facts(folder)
    assert (found.shift, found.base_shift, found.max_shift) == (2.5, 0.25, 2.0)


def test_facts_of_the_vae_are_read(folder):
    found = facts(folder)
    assert (found.vae_scaling_factor, found.vae_shift_factor, found.vae_norm_num_groups) == (
        0.5,
        0.125,
        8,
    )


@pytest.mark.parametrize(
    ("sample_size", "size"), [(256, 256), (512, 512), (1024, 1024), (2048, 1024)]
)
def test_a_small_vae_sets_the_default_size(folder, sample_size, size):
    edit(folder / "vae" / "config.json", sample_size=sample_size)
    assert facts(folder).default_size == size


@pytest.mark.parametrize(("eos", "found"), [(1, 1), (2, 49407), (49407, 49407)])
def test_clips_legacy_marker_means_the_real_token(folder, eos, found):
    edit(folder / "text_encoder" / "config.json", eos_token_id=eos)
    assert facts(folder).clip_eos_token_id == found


@pytest.mark.parametrize(
    ("model_max_length", "has_guidance", "length"),
    [(32, True, 32), (512, True, 512), (10**30, True, 512), (512, False, 256), (128, False, 128)],
)
def test_the_tokenizer_limits_the_prompt(folder, model_max_length, has_guidance, length):
    edit(folder / "tokenizer_2" / "tokenizer_config.json", model_max_length=model_max_length)
    assert facts(folder, has_guidance=has_guidance).max_sequence_length == length


def test_a_bare_folder_gets_the_values_of_flux_1_dev(tmp_path):
    found = facts(tmp_path, hidden_size=3072)
    assert (found.shift, found.default_size, found.vae_scaling_factor) == (3.0, 1024, 0.3611)


def test_a_bare_folder_without_guidance_gets_the_values_of_schnell(tmp_path):
    found = facts(tmp_path, hidden_size=3072, has_guidance=False)
    assert (found.use_dynamic_shifting, found.licence) == (False, "Apache-2.0")


def test_a_model_of_another_width_has_an_unknown_licence(tmp_path):
    assert facts(tmp_path, hidden_size=256).licence == "unknown"


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("scheduler/scheduler_config.json", "shift", "3"),
        ("scheduler/scheduler_config.json", "shift", True),
        ("scheduler/scheduler_config.json", "shift", -1.0),
        ("scheduler/scheduler_config.json", "use_dynamic_shifting", 1),
        ("scheduler/scheduler_config.json", "base_image_seq_len", 256.0),
        ("scheduler/scheduler_config.json", "max_image_seq_len", 0),
        ("scheduler/scheduler_config.json", "max_image_seq_len", 10**400),
        ("vae/config.json", "scaling_factor", [1]),
        ("vae/config.json", "scaling_factor", 0.0),
        ("vae/config.json", "sample_size", [64, 64]),
        ("vae/config.json", "sample_size", -1),
        ("vae/config.json", "norm_num_groups", 0),
        ("text_encoder/config.json", "eos_token_id", "2"),
        ("tokenizer_2/tokenizer_config.json", "model_max_length", 0),
        ("tokenizer_2/tokenizer_config.json", "model_max_length", 10**400),
    ],
)
def test_a_configuration_of_the_wrong_type_or_range_is_refused(folder, file, key, value):
    edit(folder / file, **{key: value})
    with pytest.raises(FormatError, match="must be"):
        facts(folder)


def test_tokenizers_that_are_there_are_found(folder):
    (folder / "tokenizer_2").mkdir()
    assert tokenizer_folders(folder) == {"t5": folder / "tokenizer_2"}
