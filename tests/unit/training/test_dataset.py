"""The training set: the same for the same seed, and within its limits."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from training.dataset import Arrays, draw_part, encode, fits, objects_of
from training.grammar import draw_scene, load_things


@pytest.fixture(scope="module")
def part() -> Arrays:
    return draw_part(7, 1000)


def test_the_same_seed_draws_the_same_part(part: Arrays) -> None:
    again = draw_part(7, 1000)
    assert all(np.array_equal(part[name], again[name]) for name in part)


def test_arrays_have_their_shapes_and_types(part: Arrays) -> None:
    found = {name: (array.dtype.name, array.shape) for name, array in part.items()}
    assert found == {
        "objs": ("int16", (1000, 4, 5)),
        "bg": ("uint8", (1000, 3)),
        "t5": ("int16", (1000, 32)),
        "clip": ("int16", (1000, 32)),
    }


def test_every_caption_ends_within_its_row(part: Arrays) -> None:
    assert ((part["t5"] == 1).sum(axis=1) == 1).all()
    assert (part["clip"] == 1).any(axis=1).all()


def test_unused_sprites_are_minus_one() -> None:
    scene = next(s for s in iter(lambda: draw_scene(THINGS, RANDOM), None) if s.kind == "pair")
    assert (objects_of([scene])[0, 2:] == -1).all()


def test_a_long_caption_keeps_its_end() -> None:
    t5, clip = encode(["a cat " * 40])
    assert (t5[0, -1], clip[0, -1]) == (1, 1)


def test_a_long_caption_does_not_fit() -> None:
    assert not fits("a cat " * 40)


THINGS = load_things()
RANDOM = Random(0)
