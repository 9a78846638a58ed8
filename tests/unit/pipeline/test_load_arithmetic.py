"""The arithmetic of a loaded model: what was asked for, where it is, and what is told."""

import pytest
import torch
from fake_device import FakeDevice

from flux_nf4.errors import InputError
from flux_nf4.model import fused
from flux_nf4.nf4.linear import NF4Linear
from flux_nf4.pipeline import load as load_module
from flux_nf4.pipeline.load import LoadSettings, load_model


def load(arithmetic):
    return load_model(None, LoadSettings(device="cpu", dtype=torch.float32, arithmetic=arithmetic))


def arithmetics(module):
    return {layer.arithmetic for layer in module.modules() if isinstance(layer, NF4Linear)}


def test_a_model_is_exact_unless_asked():
    model = load_model(None, LoadSettings(device="cpu"))
    assert model.arithmetic == "bf16"
    assert arithmetics(model.transformer) == {"bf16"}


@pytest.mark.parametrize("arithmetic", ["fp8", "int8"])
def test_eight_bits_reach_the_blocks_and_no_other_part(arithmetic):
    model = load(arithmetic)
    assert model.arithmetic == arithmetic
    assert arithmetics(model.transformer.blocks) == {arithmetic, "bf16"}
    assert arithmetics(model.transformer.conditioner) == {"bf16"}


@pytest.mark.parametrize(("arithmetic", "value_bytes"), [("bf16", 4), ("fp8", 1), ("int8", 1)])
def test_a_plan_knows_to_what_weights_expand(monkeypatch, arithmetic, value_bytes):
    monkeypatch.setattr(load_module, "managed_device", lambda *_: FakeDevice())
    monkeypatch.setattr(fused, "has_kernels", lambda _: True)
    wish = LoadSettings(device="cpu", dtype=torch.float32, arithmetic=arithmetic, vram=2**40)
    inventory = load_model(None, wish).memory.inventory

    width = inventory.sizes.hidden_size
    assert inventory.block_scratch_bytes == 7 * width * width * value_bytes
    assert (inventory.row_scale_bytes > 0) == (arithmetic != "bf16")


def test_auto_tells_what_it_took():
    model = load("auto")
    assert model.notes[-1].startswith(f"arithmetic `{model.arithmetic}`: ")


def test_an_unknown_arithmetic_is_refused_before_anything_is_loaded():
    with pytest.raises(InputError, match="`int4` is not an arithmetic"):
        LoadSettings(arithmetic="int4")
