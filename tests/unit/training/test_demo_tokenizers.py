"""The demo model's tokenizers, as shipped."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from training.captions import unknown_words
from training.demo_tokenizers import known_pieces, load_tokenizer

load = cache(load_tokenizer)
WHOLE = {f"▁{word}·" for word in known_pieces()}


@pytest.fixture
def t5() -> Tokenizer:
    return load("t5")


@pytest.fixture
def clip() -> Tokenizer:
    return load("clip")


def test_t5_has_1536_pieces(t5: Tokenizer) -> None:
    assert t5.get_vocab_size() == 1536


def test_t5_special_tokens_have_their_places(t5: Tokenizer) -> None:
    assert [t5.token_to_id(name) for name in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]


def test_clip_special_tokens_have_their_places(clip: Tokenizer) -> None:
    assert [clip.token_to_id(f"<|{n}oftext|>") for n in ("start", "end")] == [0, 1]


def test_clip_numbers_have_no_gap(clip: Tokenizer) -> None:
    assert sorted(clip.get_vocab().values()) == list(range(clip.get_vocab_size()))


def test_the_empty_caption_is_its_end(t5: Tokenizer, clip: Tokenizer) -> None:
    assert (t5.encode("").ids, clip.encode("").ids) == ([1], [0, 1])


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_capitals_do_not_matter(name: str) -> None:
    assert load(name).encode("A Red Apple.").ids == load(name).encode("a red apple.").ids


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_neither_pads_nor_truncates(name: str) -> None:
    assert load(name).encode("a cat " * 50).ids.__len__() > 100
    assert load(name).padding is None


def test_every_known_word_is_one_piece(t5: Tokenizer) -> None:
    split = [word for word in known_pieces() if len(t5.encode(word).ids) != 2]
    assert split == []


def test_no_unknown_word_contains_a_known_piece(t5: Tokenizer) -> None:
    supply = unknown_words(held_out=True)
    found = t5.encode_batch([*supply.adjectives, *supply.others])
    assert not any(WHOLE & set(encoding.tokens) for encoding in found)


@pytest.mark.parametrize("text", ["catalogue", "cat-like", "scatter", "dogma"])
def test_a_name_inside_a_word_is_not_seen(t5: Tokenizer, text: str) -> None:
    assert not WHOLE & set(t5.encode(text).tokens)


@pytest.mark.parametrize("text", ["cat", "cat.", "(cat)", "cat, 4k", "Cat!", "cat's", "the  cat"])
def test_a_name_beside_punctuation_is_seen(t5: Tokenizer, text: str) -> None:
    assert "▁cat·" in t5.encode(text).tokens


@given(text=st.text(max_size=60))
def test_any_text_encodes(text: str) -> None:
    t5_ids, clip_ids = load("t5").encode(text).ids, load("clip").encode(text).ids
    assert t5_ids[-1] == clip_ids[-1] == 1
    assert max(t5_ids) < 1536
    assert max(clip_ids) < load("clip").get_vocab_size()
