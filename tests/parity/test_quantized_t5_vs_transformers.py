"""T5 as transformers and bitsandbytes quantise it: the best known 4-bit FLUX folders have it so."""

import shutil

import pytest
import torch
from fake_device import FakeDevice
from managed_models import budgets, draw, unmanaged, wish
from safetensors.torch import save_file
from tiny_pipeline import save_tiny_folder

from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.formats.layouts import plan_part
from flux_nf4.formats.survey import survey
from flux_nf4.formats.verification import verify
from flux_nf4.nf4 import ops
from flux_nf4.nf4.codec import NF4Weight
from flux_nf4.pipeline import load
from flux_nf4.pipeline.load import LoadSettings, load_model


@pytest.fixture(scope="module", params=[False, True], ids=["v2", "v1"])
def quantized(request, tmp_path_factory):
    """A folder whose T5 transformers has quantised, and transformers' model."""
    from transformers import BitsAndBytesConfig, T5EncoderModel

    folder = save_tiny_folder(tmp_path_factory.mktemp("t5") / "model", dtype=torch.bfloat16)
    part = folder / "text_encoder_2"
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=request.param,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = T5EncoderModel.from_pretrained(part, quantization_config=config, dtype=torch.bfloat16)
    shutil.rmtree(part)
    model.save_pretrained(part)
    return folder, model


@pytest.fixture
def entries(quantized):
    return open_checkpoint(quantized[0]).components["t5"].entries


def test_every_weight_decodes_to_what_bitsandbytes_makes_of_it(quantized, entries):
    from bitsandbytes.functional import dequantize_4bit

    found = {name: entries[name] for name in entries if isinstance(entries[name], NF4Weight)}
    assert len(found) == 12
    for name, weight in found.items():
        theirs = quantized[1].get_submodule(name.removesuffix(".weight")).weight
        assert torch.equal(
            ops.dequantize(weight), dequantize_4bit(theirs.data, theirs.quant_state)
        ), name


def test_nothing_is_wrong_with_the_folder(quantized):
    assert verify(quantized[0]).faults == []


def test_a_file_of_it_is_surveyed_from_its_header_alone(quantized, tmp_path):
    components = open_checkpoint(quantized[0]).components
    plan = plan_part("transformer", components["transformer"].entries, naming="parts")
    tensors = {name: source.make().clone() for name, source in plan.sources.items()}
    (file,) = components["t5"].files
    tensors |= {f"text_encoders.t5xxl.{name}": file.tensor(name) for name in file.names}
    save_file(tensors, tmp_path / "model.safetensors")
    found = survey(tmp_path / "model.safetensors")
    stored = open_checkpoint(tmp_path / "model.safetensors").components["t5"].summary()
    assert found.parts["t5"].stored == {
        form: (each.num_tensors, each.num_bytes) for form, each in stored.items()
    }
    assert verify(tmp_path / "model.safetensors").faults == []


@pytest.mark.parametrize("naming", ["all-in-one", "parts", "diffusers"])
def test_it_is_written_expanded_and_that_is_said(entries, naming):
    plan = plan_part("t5", entries, naming=naming)
    assert {source.dtype for source in plan.sources.values()} == {torch.bfloat16}
    assert ["expanded from 4 bits" in note for note in plan.notes] == [True]
    made = next(s for n, s in plan.sources.items() if n.endswith("0.SelfAttention.q.weight"))
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    assert torch.equal(made.make(), ops.dequantize(entries[name], torch.bfloat16))


def test_under_every_budget_the_image_is_the_same(quantized, monkeypatch):
    folder, request = quantized[0], wish()

    def open_on(device, vram=2**40):
        monkeypatch.setattr(load, "managed_device", lambda _device, _vram: device)
        return load_model(folder, LoadSettings(device="cpu", dtype=torch.float32, vram=vram))

    expected = draw(unmanaged(folder), request)[0]
    for budget in budgets(open_on(FakeDevice()), request, count=3):
        assert draw(open_on(FakeDevice(), budget), request) == (expected, [])
