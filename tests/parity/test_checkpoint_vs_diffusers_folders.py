"""What Diffusers saves, we read; what we call by BFL's names, Diffusers' converters agree on."""

import pytest
import torch
from checkpoints import (
    canonical_entries,
    save_all_in_one,
    save_diffusers_folder,
    save_quantized_diffusers_folder,
    tiny_models,
)
from safetensors.torch import load_file

from flux_nf4.formats.folder import read_part
from flux_nf4.formats.keymap import transformer_table, vae_table
from flux_nf4.nf4 import reference

# Published (FLUX.1-dev's transformer/config.json, vae/config.json); the defaults of the class.
FLUX_TRANSFORMER = {"guidance_embeds": True}
FLUX_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


@pytest.fixture(scope="module")
def models():
    return tiny_models(seed=5, num_double_blocks=2, num_single_blocks=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, models):
    return save_diffusers_folder(
        tmp_path_factory.mktemp("folder") / "tiny", models=models, dtype=torch.float32
    )


@pytest.fixture(scope="module")
def entries(folder):
    return canonical_entries(folder)


def fused(name, pieces):
    """The canonical tensor that Diffusers' pieces make up, by the format's text."""
    whole = torch.cat(pieces)
    if "adaLN_modulation" in name:
        scale, shift = whole.chunk(2)
        return torch.cat((shift, scale))
    return whole


def test_every_transformer_tensor_of_a_folder_is_read_right(models, entries):
    state = models["transformer"].state_dict()
    table = transformer_table(2, 3).names
    assert entries["transformer"].keys() == table.keys()
    for name, names in table.items():
        expected = fused(name, [state[piece] for piece in names])
        assert torch.equal(entries["transformer"][name], expected), name


@pytest.mark.parametrize(("kind", "shard"), [("transformer", 300_000), ("t5", 100_000)])
def test_a_variant_in_shards_holds_the_same(models, entries, tmp_path, kind, shard):
    models[kind].save_pretrained(tmp_path, variant="fp16", max_shard_size=shard)
    assert len(list(tmp_path.glob("*.fp16-*-of-*.safetensors"))) > 1
    found = read_part(kind, tmp_path).entries
    assert found.keys() == entries[kind].keys()
    assert all(torch.equal(found[name], entries[kind][name]) for name in found)


@pytest.mark.parametrize("kind", ["t5", "vae"])
def test_every_tensor_of_the_other_parts_is_read_right(models, entries, kind):
    state = models[kind].state_dict()
    state.pop("encoder.embed_tokens.weight", None)
    assert entries[kind].keys() == state.keys()
    assert all(torch.equal(entries[kind][name], tensor) for name, tensor in state.items())


def test_every_clip_tensor_is_read_right(models, entries):
    state = {
        f"text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in models["clip"].state_dict().items()
        if "position_ids" not in name
    }
    assert entries["clip"].keys() == state.keys()
    assert all(torch.equal(entries["clip"][name], tensor) for name, tensor in state.items())


def test_an_all_in_one_file_holds_the_folders_tensors(tmp_path):
    path = save_all_in_one(tmp_path / "a.safetensors", transformer=torch.bfloat16)
    source = canonical_entries(tmp_path / "a-source")
    found = canonical_entries(path)
    for kind, dtype in (("transformer", None), ("vae", None), ("clip", torch.float16)):
        for name, entry in source[kind].items():
            expected = entry if dtype is None else entry.to(dtype)
            assert torch.equal(found[kind][name].float(), expected.float()), name


@pytest.mark.parametrize("nested", [False, True])
def test_a_quantised_folder_decodes_to_the_fused_pieces(tmp_path, models, nested):
    folder = save_quantized_diffusers_folder(tmp_path / "q", nested=nested, models=models)
    state = models["transformer"].state_dict()
    found = canonical_entries(folder)["transformer"]
    for name, names in transformer_table(2, 3).names.items():
        pieces = [
            reference.dequantize(reference.quantize(state[piece], nested=nested))
            if state[piece].dim() == 2
            else state[piece]
            for piece in names
        ]
        entry = found[name]
        values = entry if isinstance(entry, torch.Tensor) else reference.dequantize(entry)
        assert torch.equal(values, fused(name, pieces)), name


def test_our_names_are_those_of_flux_1_dev_in_diffusers():
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        state = FluxTransformer2DModel(**FLUX_TRANSFORMER).state_dict()
    assert transformer_table(19, 38).inverse().keys() == state.keys()


def test_our_names_are_those_of_flux_1_devs_vae_in_diffusers():
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        state = AutoencoderKL(**FLUX_VAE).state_dict()
    table = vae_table(4, 2)
    assert state.keys() <= table.names.keys()
    assert table.required(state) == state.keys()


def test_diffusers_own_converter_agrees_on_every_transformer_name():
    from diffusers.loaders.single_file_utils import (
        convert_flux_transformer_checkpoint_to_diffusers,
    )

    table = transformer_table(2, 3)
    # It knows FLUX's width only: 3072 rows, so the columns are kept thin.
    hidden, checkpoint = 3072, {}
    for i, (name, names) in enumerate(table.names.items()):
        rows = {1: 2, 3: 3, 4: 7}[len(names)] * hidden
        checkpoint[name] = torch.arange(rows, dtype=torch.float32) + 100_000 * i
    converted = convert_flux_transformer_checkpoint_to_diffusers(dict(checkpoint))
    assert converted.keys() == table.inverse().keys()
    for name, names in table.names.items():
        assert torch.equal(fused(name, [converted[n] for n in names]), checkpoint[name]), name


def test_diffusers_own_converter_agrees_on_every_vae_name(tmp_path):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    path = save_all_in_one(tmp_path / "a.safetensors")
    ldm = {
        name.removeprefix("vae."): tensor
        for name, tensor in load_file(path).items()
        if name.startswith("vae.")
    }
    config = {"down_block_types": [""] * 4, "up_block_types": [""] * 4}
    converted = convert_ldm_vae_checkpoint(ldm, config)
    found = canonical_entries(path)["vae"]
    assert converted.keys() == found.keys()
    for name, tensor in converted.items():
        assert torch.equal(found[name].flatten(), tensor.flatten()), name


def test_a_vae_from_an_all_in_one_file_loads_strictly_into_diffusers(tmp_path, models):
    path = save_all_in_one(tmp_path / "a.safetensors")
    found = dict(canonical_entries(path)["vae"])
    keys = models["vae"].load_state_dict(found, strict=True)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
