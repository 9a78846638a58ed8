"""The scales of the shipped model, tuned while its codes stay."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.nf4.codec import NF4Weight
from flux_nf4.nf4.reference import dequantize
from training import tune_scales
from training.dataset import draw_part, encode
from training.package_demo import BF16, SHIPPED
from training.tune_scales import FreeScales, Lesson, train, write_tuned

CPU = torch.device("cpu")
LAYER = "single_blocks.0.linear1.weight"


def test_scales_that_were_not_changed_give_the_weights_of_the_file() -> None:
    component = open_checkpoint(SHIPPED).components["transformer"]
    free = FreeScales(component, CPU)

    weights, entries = free.weights(), free.entries()

    assert torch.equal(weights[LAYER].detach(), dequantize(component.entries[LAYER], torch.float32))
    assert torch.equal(entries[LAYER].absmax, component.entries[LAYER].absmax)
    bias = LAYER.replace("weight", "bias")
    assert torch.equal(entries[bias], component.entries[bias])
    assert entries[bias].dtype == component.entries[bias].dtype


@pytest.fixture
def lesson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lesson:
    path = tmp_path / "scenes.npz"
    u5, uc = encode([""])
    np.savez(path, u5=u5, uc=uc, **draw_part(0, 12))
    for name, value in (("NUM_HELD_OUT", 4), ("NUM_VALIDATION_BATCHES", 1)):
        monkeypatch.setattr(tune_scales, name, value)
    torch.manual_seed(0)
    return Lesson(SHIPPED, BF16, path, num_scenes=8, batch_size=2, device=CPU)


def test_a_lesson_brings_the_shipped_model_nearer_to_its_teacher(
    lesson: Lesson, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tune_scales.time, "monotonic", itertools.count().__next__)
    monkeypatch.setattr(lesson, "draw", lambda _: lesson.validation[0])
    said: list[str] = []
    before = lesson.validate()

    train(lesson, 6.0, said.append)
    write_tuned(SHIPPED, lesson.free.entries(), tmp_path / "tuned.safetensors")

    assert lesson.validate() < before
    assert said[-1] == "5 steps of 2"
    old, new = (open_checkpoint(path) for path in (SHIPPED, tmp_path / "tuned.safetensors"))
    assert (new.quantization, new.facts) == (old.quantization, old.facts)
    codes, tuned = old.components["transformer"].entries[LAYER], new.components["transformer"]
    assert isinstance(codes, NF4Weight)
    assert torch.equal(tuned.entries[LAYER].codes, codes.codes)
    assert not torch.equal(tuned.entries[LAYER].absmax, codes.absmax)
    for kind in ("t5", "clip", "vae"):
        for name, entry in old.components[kind].entries.items():
            assert torch.equal(new.components[kind].entries[name], entry)
