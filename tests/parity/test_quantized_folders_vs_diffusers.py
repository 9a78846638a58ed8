"""Diffusers itself loads the four-bit folders that `convert` writes, for every variant of FLUX.

Diffusers asks for a GPU before it loads such a folder, though neither loading nor bitsandbytes
needs one: that question alone is answered for it. Everything behind it is its own.
"""

import pytest
import torch
from checkpoints import save_all_in_one, save_all_in_one_v1

from flux_nf4.cli import main
from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.formats.keymap import transformer_table
from flux_nf4.nf4 import reference
from flux_nf4.nf4.codec import NF4Weight

SIZES = {
    "dev": {},
    "schnell": {"guidance": False},
    "fill": {"in_channels": 384},
    "canny/depth": {"in_channels": 128},
    "more blocks": {"num_double_blocks": 2, "num_single_blocks": 3},
}
SWAPPED = "final_layer.adaLN_modulation.1.weight"


@pytest.fixture
def load(monkeypatch):
    """Diffusers' transformer from a folder, without its question for a GPU."""
    from diffusers import FluxTransformer2DModel
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer

    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda *_: {"": "cpu"})
    return lambda folder: FluxTransformer2DModel.from_pretrained(
        folder / "transformer", torch_dtype=torch.bfloat16
    )


def decoded(model, name):
    """A weight of Diffusers' model, expanded by bitsandbytes."""
    from bitsandbytes.functional import dequantize_4bit

    weight = model.get_submodule(name.removesuffix(".weight")).weight
    return dequantize_4bit(weight.data, weight.quant_state)


def table_of(sizes):
    num_blocks = sizes.get("num_double_blocks", 1), sizes.get("num_single_blocks", 2)
    return transformer_table(*num_blocks, "diffusers")


@pytest.mark.parametrize(
    ("save", "sizes"),
    [
        *(pytest.param(save_all_in_one, sizes, id=f"{name}-v2") for name, sizes in SIZES.items()),
        pytest.param(save_all_in_one_v1, SIZES["more blocks"], id="more blocks-v1"),
    ],
)
def test_every_weight_that_diffusers_has_is_a_slice_of_the_file_s(tmp_path, load, save, sizes):
    source = save(tmp_path / "a.safetensors", **sizes)
    assert main(["convert", str(source), str(tmp_path / "f"), "--layout", "diffusers", "-q"]) == 0
    model, table = load(tmp_path / "f"), table_of(sizes)
    different = []
    for name, entry in open_checkpoint(source).components["transformer"].entries.items():
        if not isinstance(entry, NF4Weight):
            continue
        whole = reference.dequantize(entry)
        expected = torch.cat(whole.chunk(2)[::-1]) if name == SWAPPED else whole
        if not torch.equal(
            torch.cat([decoded(model, each) for each in table.names[name]]), expected
        ):
            different.append(name)

    assert different == []


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_variant_comes_back_from_a_folder_byte_for_byte(tmp_path, sizes):
    source, back = save_all_in_one(tmp_path / "a.safetensors", **sizes), tmp_path / "b.safetensors"
    assert main(["convert", str(source), str(tmp_path / "f"), "--layout", "diffusers", "-q"]) == 0
    assert main(["convert", str(tmp_path / "f"), str(back), "-q"]) == 0

    assert back.read_bytes() == source.read_bytes()
