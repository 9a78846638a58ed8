"""The decoder of the shipped model, tuned on latents as the transformer makes them."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.pipeline.load import LoadSettings, Model, assemble_model
from training import tune_decoder
from training.compose import Composer, load_sprites
from training.dataset import draw_part, encode
from training.package_demo import BF16, SHIPPED
from training.tune_decoder import Lesson, Scenes, decibels, draw_again, train, write_decoder

NUM_SCENES = 6


@pytest.fixture(scope="module")
def model() -> Model:
    settings = LoadSettings(device="cpu", dtype=torch.bfloat16)
    return assemble_model(open_checkpoint(SHIPPED), settings)


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer(load_sprites())


@pytest.fixture(scope="module")
def scenes(model: Model, composer: Composer, tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    path = tmp_path_factory.mktemp("scenes") / "scenes.npz"
    u5, uc = encode([""])
    np.savez(path, u5=u5, uc=uc, **draw_part(0, NUM_SCENES))
    return draw_again(model, composer, path, NUM_SCENES, 4, lambda _line: None)


def test_scenes_drawn_again_are_the_same_scenes(
    model: Model, composer: Composer, scenes: Scenes
) -> None:
    assert len(scenes.bg) == NUM_SCENES
    images = model.autoencoder.decode(scenes.drawn.float()).float()
    error_B = (images - composer(scenes.objs, scenes.shade)).pow(2).mean((1, 2, 3))

    assert decibels(error_B).min() > tune_decoder.LEAST_DECIBELS
    assert not torch.equal(scenes.drawn, scenes.encoded)


def test_what_became_another_scene_is_left_out(
    model: Model,
    composer: Composer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    u5, uc = encode([""])
    parts = draw_part(0, 2)
    parts["objs"] = parts["objs"][[1, 0]]  # the captions now tell of the other picture
    np.savez(tmp_path / "scenes.npz", u5=u5, uc=uc, **parts)
    monkeypatch.setattr(tune_decoder, "NUM_LEFT_OUT", 0)  # from noise alone
    said: list[str] = []

    found = draw_again(model, composer, tmp_path / "scenes.npz", 2, 2, said.append)

    assert len(found.bg) == 0
    assert said[-1] == "0 of 2 scenes are what they were"


def test_a_lesson_makes_the_decoder_better_and_nothing_else_changes(
    model: Model,
    composer: Composer,
    scenes: Scenes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(tune_decoder, "NUM_HELD_OUT", 2)
    lesson = Lesson(model, composer, scenes, batch_size=2)
    drawn = torch.tensor([True, False])
    monkeypatch.setattr(lesson, "loss", lambda: -lesson.quality(lesson.held_out, drawn).mean())
    monkeypatch.setattr(tune_decoder.time, "monotonic", itertools.count().__next__)
    said: list[str] = []
    before = lesson.validate()

    train(lesson, 6.0, said.append)
    assert sum(lesson.validate()) > sum(before)
    assert said[-1] == "5 steps of 2"

    for path in (SHIPPED, BF16):
        write_decoder(path, lesson.decoder, tmp_path / path.name)
        old, new = open_checkpoint(path), open_checkpoint(tmp_path / path.name)
        assert (new.quantization, new.facts) == (old.quantization, old.facts)
        for name, entry in old.components["vae"].entries.items():
            same = torch.equal(new.components["vae"].entries[name], entry)
            assert same != name.startswith("decoder."), name
            assert new.components["vae"].entries[name].dtype == entry.dtype
        for kind in ("t5", "clip"):
            for name, entry in old.components[kind].entries.items():
                assert torch.equal(new.components[kind].entries[name], entry)
