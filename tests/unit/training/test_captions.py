"""Captions: what they say, and which words they may carry."""

from __future__ import annotations

import json
import re
from random import Random

import pytest

from training import ASSETS
from training.captions import (
    caption,
    is_held_out_word,
    known_words,
    plain_caption,
    template_words,
    unknown_caption,
    unknown_words,
    vocabulary,
    with_article,
)
from training.fetch_art import CONCEPTS, parse_concepts
from training.grammar import Scene, Sprite, draw_scene, load_things

WORD = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
THINGS = load_things()
KNOWN = known_words(THINGS)
HELD_OUT, TRAINED = (
    {*words.adjectives, *words.others}
    for words in (unknown_words(held_out=True), unknown_words(held_out=False))
)


def words_of(text: str) -> set[str]:
    return set(WORD.findall(text))


def index_of(name: str) -> int:
    return next(i for i, thing in enumerate(THINGS) if name in thing.names)


def scene_of(*names: str, **said: object) -> Scene:
    sprites = tuple(Sprite(index_of(name), 128, 128, 192) for name in names)
    fields = {"kind": "one", "sprites": sprites, "background": "orange", "shade": (245, 146, 52)}
    return Scene(**(fields | said))


def test_no_listed_word_means_anything() -> None:
    assert not (HELD_OUT | TRAINED) & KNOWN


def test_a_tenth_of_the_listed_words_is_held_out() -> None:
    assert 0.08 < len(HELD_OUT) / (len(HELD_OUT) + len(TRAINED)) < 0.12


def test_no_training_caption_carries_a_held_out_word() -> None:
    random = Random(2)
    texts = [caption(draw_scene(THINGS, random), THINGS, random) for _ in range(4000)]
    assert not HELD_OUT & set().union(*map(words_of, texts))


def test_made_up_words_are_not_names() -> None:
    random, words = Random(3), unknown_words(held_out=False)
    assert not {words.draw(random) for _ in range(20_000)} & KNOWN


def test_unknown_caption_carries_one_to_three_held_out_words() -> None:
    random, words = Random(4), unknown_words(held_out=True)
    meant = KNOWN | template_words()
    unknown: list[list[str]] = []
    for _ in range(500):
        text = unknown_caption(draw_scene(THINGS, random), THINGS, random, words, max_words=3)
        unknown.append([word for word in WORD.findall(text) if word not in meant])
    assert {len(row) for row in unknown} == {1, 2, 3}
    assert all(is_held_out_word(word) for row in unknown for word in row)


def test_captions_of_known_words_carry_no_listed_word() -> None:
    random = Random(5)
    scenes = [draw_scene(THINGS, random) for _ in range(1000)]
    texts = [caption(s, THINGS, random, known=True) for s in scenes if s.kind != "nothing"]
    listed = (HELD_OUT | TRAINED) - template_words()
    assert not listed & set().union(*map(words_of, texts))


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (scene_of("cat"), "a cat on an orange background"),
        (scene_of("cat", kind="big", size_word="big"), "a big cat on an orange background"),
        (scene_of("owl", "fish", kind="pair", relation="above"),
         "an owl above fish on an orange background"),
        (scene_of("mouse", "mouse", kind="count"), "two mice on an orange background"),
        (scene_of("cat", kind="place", place="at the top", says_background=False),
         "a cat at the top"),
    ],
)  # fmt: skip
def test_plain_caption_says_what_the_scene_says(scene: Scene, text: str) -> None:
    assert plain_caption(scene, THINGS) == text


@pytest.mark.parametrize(
    ("phrase", "text"),
    [("owl", "an owl"), ("unicorn", "a unicorn"), ("ufo", "a ufo"), ("cat", "a cat")],
)
def test_article_follows_the_sound(phrase: str, text: str) -> None:
    assert with_article(phrase) == text


def test_no_name_belongs_to_two_things() -> None:
    names = [name for thing in THINGS for name in thing.names]
    assert len(names) == len(set(names))


def test_committed_things_are_those_of_the_concept_list() -> None:
    assert parse_concepts(CONCEPTS.read_text(encoding="utf-8"))[1] == THINGS


def test_shipped_words_are_those_of_the_grammar() -> None:
    shipped = json.loads((ASSETS / "demo" / "words.json").read_text(encoding="utf-8"))
    assert shipped == vocabulary(THINGS)
