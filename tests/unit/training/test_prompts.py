"""The committed prompts: how many, and that training never saw what they ask for."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from training.captions import is_held_out_word, known_words, template_words
from training.dataset import fits
from training.grammar import SIZE_OF_WORD, is_held_out, load_things
from training.prompts import FREE, GRID, load_prompts

PROMPTS = load_prompts()
KNOWN = known_words(load_things())
Spec = dict[str, Any]


def held_out_combinations(spec: Spec) -> list[bool]:
    concepts = [concept for concept, _ in spec["objects"]]
    asked: dict[str, tuple[int, int | str]] = {
        "background": (concepts[0], spec["background"]),
        "count": (concepts[0], len(concepts)),
        "place": (concepts[0], spec.get("place", "")),
        "pair": (concepts[0], concepts[-1]),
        "tint": (concepts[0], spec["objects"][0][1]),
        "size": (concepts[0], SIZE_OF_WORD.get(spec.get("size_word", ""), 0)),
    }
    name = spec["set"]
    return [is_held_out(name, *asked[name])]


def test_there_are_2004_test_prompts() -> None:
    assert Counter(spec["set"] for spec in PROMPTS["test"]) == {
        "thing": 524,
        "background": 540,
        "count": 180,
        "place": 180,
        "pair": 300,
        "tint": 160,
        "size": 120,
    }


@pytest.mark.parametrize(("name", "held_out"), [("test", True), ("val", False)])
def test_combinations_are_held_out_where_they_should_be(name: str, held_out: bool) -> None:
    specs = [spec for spec in PROMPTS[name] if spec["set"] != "thing"]
    assert all(held_out_combinations(spec) == [held_out] for spec in specs)


def test_every_thing_is_asked_for_once() -> None:
    asked = [spec["objects"][0][0] for spec in PROMPTS["test"] if spec["set"] == "thing"]
    assert asked == list(range(524))


def test_unknown_prompts_carry_only_unknown_words_that_training_never_saw() -> None:
    words = [re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", s["caption"]) for s in PROMPTS["unknown"]]
    meant = KNOWN | template_words()
    unknown = [[word for word in row if word not in meant] for row in words]
    assert {len(row) for row in unknown} == {1, 2, 3}
    assert all(is_held_out_word(word) for row in unknown for word in row)


def test_there_are_200_unknown_prompts() -> None:
    assert len(PROMPTS["unknown"]) == 200


@pytest.mark.parametrize("name", ["test", "val", "unknown"])
def test_every_prompt_fits(name: str) -> None:
    assert all(fits(spec["caption"]) for spec in PROMPTS[name])


def test_there_are_32_prompts_for_the_eye() -> None:
    assert (len(GRID), len(FREE)) == (32, 32)
