import subprocess
import sys

import pytest
import torch
from checkpoints import (
    TINY_FACTS,
    canonical_entries,
    save_all_in_one,
    save_all_in_one_v1,
    save_diffusers_folder,
    save_quantized_diffusers_folder,
    save_transformer_only,
)
from safetensors.torch import load_file, save_file

from flux_nf4.errors import FormatError
from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.memory import checkpoint_inventory
from flux_nf4.memory.checkpoint_inventory import flux_1_dev, read_inventory
from flux_nf4.memory.inventory import take_inventory
from flux_nf4.model.build import build_autoencoder, build_clip, build_t5, build_transformer


def transformer_bytes(inventory):
    blocks = sum(unit.num_bytes for unit in (*inventory.blocks, *inventory.conditioner))
    return blocks + inventory.fixed_bytes


@pytest.mark.parametrize(
    ("form", "all_gb", "core_gb"),
    [("nf4 v2", 6.70, 4.84), ("nf4 v1", 6.15, 4.44), ("bf16", 23.8, 17.2), ("fp8", 11.9, 8.61)],
)
def test_flux_1_dev_weighs_what_the_books_say(form, all_gb, core_gb):
    inventory = flux_1_dev(form)

    assert transformer_bytes(inventory) / 1e9 == pytest.approx(all_gb, rel=0.002)
    core_bytes = sum(unit.num_bytes for unit in inventory.blocks)
    assert core_bytes / 1e9 == pytest.approx(core_gb, rel=0.002)


def test_modulation_of_flux_1_dev_weighs_what_the_books_say():
    modulation = (unit for unit in flux_1_dev().conditioner if unit.name != "conditioner.embedders")

    assert sum(unit.num_bytes for unit in modulation) / 1e9 == pytest.approx(1.83, rel=0.002)


def test_units_come_in_the_order_in_which_they_compute():
    names = [unit.name for unit in flux_1_dev().blocks]

    assert names == [f"blocks.double.{i}" for i in range(19)] + [
        f"blocks.single.{i}" for i in range(38)
    ]


def test_a_transformer_is_expanded_by_its_largest_layer():
    assert flux_1_dev().block_scratch_bytes == 7 * 3072 * 3072 * 2


def test_in_eight_bits_a_weight_expands_to_half_and_every_row_has_two_scales():
    parts = checkpoint_inventory._flux_1_dev_entries("nf4 v2")
    inventory = take_inventory("FLUX.1-dev", parts, is_eight_bit=True)
    rows_of_a_stream = (3 + 1 + 4 + 1) * 3072

    assert inventory.block_scratch_bytes == 7 * 3072 * 3072
    assert inventory.row_scale_bytes == 8 * (19 * 2 * rows_of_a_stream + 38 * (7 + 1) * 3072)
    assert inventory.num_bytes == flux_1_dev().num_bytes


def test_weights_stored_in_fp8_are_multiplied_in_bf16():
    parts = checkpoint_inventory._flux_1_dev_entries("fp8")
    assert take_inventory("FLUX.1-dev", parts, is_eight_bit=True) == take_inventory(
        "FLUX.1-dev", parts
    )


def test_a_bf16_transformer_is_not_expanded():
    assert flux_1_dev("bf16").block_scratch_bytes == 0


SAVED = {
    "v2": save_all_in_one,
    "v1": save_all_in_one_v1,
    "bf16": lambda path: save_all_in_one(path, transformer=torch.bfloat16),
    "fp8": lambda path: save_all_in_one(path, transformer=torch.float8_e4m3fn),
    "folder": save_diffusers_folder,
    "quantized folder": save_quantized_diffusers_folder,
}


@pytest.fixture(scope="module", params=SAVED)
def checkpoint(request, tmp_path_factory):
    """The same tiny model in every layout."""
    name = "model" if "folder" in request.param else "model.safetensors"
    path = tmp_path_factory.mktemp("inventory") / name
    SAVED[request.param](path)
    return path


def loaded_bytes(module):
    return sum(each.nbytes for each in (*module.parameters(), *module.buffers()))


def test_an_inventory_weighs_what_the_loaded_modules_take(checkpoint):
    inventory, _ = read_inventory(checkpoint)
    components = open_checkpoint(checkpoint).components
    where = {"device": "cpu", "dtype": torch.bfloat16}
    transformer = build_transformer(components["transformer"], **where)
    t5 = build_t5(components["t5"], **where)
    clip = build_clip(components["clip"], TINY_FACTS, **where)
    vae = build_autoencoder(components["vae"], TINY_FACTS, **where)
    weighed = {
        "transformer and t5": transformer_bytes(inventory)
        + sum(unit.num_bytes for unit in inventory.t5)
        + inventory.t5_table_bytes,
        "clip": inventory.clip.num_bytes,
        "vae": inventory.vae.num_bytes,
    }
    positions = sum(buffer.nbytes for buffer in clip.buffers())
    # Of v1 every layer has its offset as a tensor, which the file has as text.
    offsets = 4 * sum(name.endswith("nested_offset") for name, _ in transformer.named_buffers())

    assert weighed == {
        "transformer and t5": loaded_bytes(transformer) - offsets + loaded_bytes(t5),
        "clip": loaded_bytes(clip) - positions,
        "vae": loaded_bytes(vae),
    }


def test_a_plain_file_and_a_checkpoint_opened_in_full_tell_the_same(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_all_in_one(path)
    plain, _ = read_inventory(path)
    monkeypatch.setattr(checkpoint_inventory, "_plain_entries", lambda _path: None)

    assert read_inventory(path)[0] == plain


def test_what_a_file_lacks_is_planned_as_flux_1_dev_has_it(tmp_path):
    folder, path = tmp_path / "folder", tmp_path / "model.safetensors"
    save_diffusers_folder(folder)
    save_transformer_only(path, canonical_entries(folder)["transformer"])

    assert read_inventory(path)[0].t5 == flux_1_dev().t5


@pytest.mark.parametrize(
    "code",
    [
        "import flux_nf4.memory.plan",
        "from flux_nf4.cli import main; main(['plan', '--vram', '6GB'])",
        "from flux_nf4.cli import main; main(['plan', '--vram', '6GB', '-m', 'demo'])",
    ],
)
def test_planning_imports_no_torch(code):
    report = "import sys; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", f"{code}; {report}"], check=False).returncode == 0


@pytest.mark.parametrize("transformer", ["nf4", torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.diffusion_model.double_blocks.0.img_mlp.0.bias", (2, 64)),
        ("model.diffusion_model.double_blocks.0.img_mlp.0.bias", (0,)),
        ("model.diffusion_model.final_layer.linear.bias", ()),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight", ()),
        ("vae.encoder.down.0.block.0.conv1.weight", (8,)),
        ("vae.decoder.mid.block_1.conv1.bias", (8, 8)),
    ],
)
def test_impossible_shapes_are_the_files_fault(tmp_path, transformer, name, shape):
    path = save_all_in_one(tmp_path / "model.safetensors", transformer=transformer)
    save_file(load_file(path) | {name: torch.zeros(shape)}, path)
    with pytest.raises(FormatError, match=r"model\.safetensors`: "):
        read_inventory(path)
