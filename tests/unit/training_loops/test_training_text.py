"""Text encoders trained on captions alone: what they are asked, and that they learn it."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from training import train_text
from training.checkpoint import save_tensors
from training.dataset import draw_part
from training.listener import Listener
from training.networks import (
    ClipText,
    Sizes,
    T5Encoder,
    neighbour_biases,
    start_clip,
    start_t5,
)
from training.package_demo import SHIPPED
from training.rounding import to_e4m3
from training.train_text import Lesson, cells_of

SHIPPED_SIZES = Sizes(t5_vocabulary=1536, clip_vocabulary=2085)


def test_a_sprite_covers_the_cells_whose_centres_it_covers() -> None:
    objects = torch.full((1, 4, 5), -1)
    objects[0, 0] = torch.tensor([7, 64, 128, 128, 2])  # left of the middle
    things, tints = cells_of(objects)
    assert things.view(4, 4).tolist() == [[0] * 4, [8, 8, 0, 0], [8, 8, 0, 0], [0] * 4]
    assert tints.max() == 3


def test_biases_of_distance_survive_e4m3() -> None:
    biases = neighbour_biases(6)
    assert torch.equal(to_e4m3([biases])[0], biases)


def test_t5_hears_the_order_of_words_from_the_start() -> None:
    torch.manual_seed(0)
    t5 = start_t5(T5Encoder(Sizes(t5_vocabulary=64, clip_vocabulary=64)))
    ids = torch.arange(3, 35)[None]
    swapped = ids.clone()
    swapped[0, [2, 5]] = ids[0, [5, 2]]
    with torch.no_grad():
        first, second = t5(ids)[0, 2], t5(swapped)[0, 5]
    assert (first - second).norm() / first.norm() > 0.05


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import numpy as np

    path = tmp_path_factory.mktemp("captions") / "scenes.npz"
    np.savez(path, **draw_part(0, 300))
    return path


def test_training_lowers_the_loss(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_text, "NUM_HELD_OUT", 8)
    monkeypatch.setattr(train_text, "BATCH_SIZE", 8)
    ticks = itertools.count()  # a step a second, however busy this machine is
    monkeypatch.setattr(train_text, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    torch.manual_seed(0)
    lesson = Lesson(scenes)
    before = torch.stack([lesson.loss().detach() for _ in range(4)]).mean()
    train_text.train(lesson, 40.0, print)
    after = torch.stack([lesson.loss().detach() for _ in range(4)]).mean()
    assert after < before - 3.0


def test_unseen_captions_are_not_trained_on(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_text, "NUM_HELD_OUT", 8)
    lesson = Lesson(scenes)
    assert lesson.num_seen <= int(lesson.unseen.min())


@pytest.fixture(scope="module")
def listener() -> Listener:
    return Listener(SHIPPED, SHIPPED_SIZES)


def test_a_listener_misses_nothing_of_its_own_encoders(listener: Listener) -> None:
    ids = torch.randint(3, 1000, (2, 4, 32))
    encoded = (listener.t5(ids[0]), listener.clip(ids[1]))
    assert [error.item() for error in listener.missed((ids[0], ids[1]), encoded)] == pytest.approx(
        [0.0, 0.0], abs=1e-9
    )


def test_a_listener_misses_what_other_encoders_say(listener: Listener) -> None:
    ids = torch.randint(3, 1000, (2, 4, 32))
    clip = start_clip(ClipText(SHIPPED_SIZES))
    encoded = (T5Encoder(SHIPPED_SIZES)(ids[0]), clip(ids[1]))
    assert all(error.item() > 0.3 for error in listener.missed((ids[0], ids[1]), encoded))


def test_encoders_learn_to_be_understood(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_text, "NUM_HELD_OUT", 8)
    monkeypatch.setattr(train_text, "BATCH_SIZE", 8)
    ticks = itertools.count()
    monkeypatch.setattr(train_text, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    torch.manual_seed(0)
    lesson = Lesson(scenes, listener=SHIPPED)
    before = missed(lesson)
    train_text.train(lesson, 40.0, print)
    assert all(after < 0.7 * was for after, was in zip(missed(lesson), before, strict=True))
    # What is written goes on from where it was written.
    save_tensors(tmp_path / "text.safetensors", lesson.tensors())
    again = Lesson(scenes, init=tmp_path / "text.safetensors", listener=SHIPPED)
    assert missed(again) == pytest.approx(missed(lesson), abs=0.02)


def missed(lesson: Lesson) -> list[float]:
    with torch.no_grad():
        encoded = lesson.encode(lesson.unseen)
        return [error.item() for error in lesson.missed(lesson.unseen, encoded)]
