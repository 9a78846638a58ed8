"""The packaged FLUX.1 tokenizers against transformers' own on the same vocabularies."""

from __future__ import annotations

import base64
import gzip
import json
from functools import cache
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

PROMPTS = [
    "",
    " ",
    "a red apple",
    "  a red   apple \n\t ",
    "A RED Apple on a Light-Blue background",
    "Astronaut in a jungle, cold color palette, muted colors",
    "it's, they're, we've, I'm, you'll, he'd, don't; 'tis 'S 'RE",
    "(masterpiece:1.2), [[best quality]], <lora:x:0.8>, 8k!!! --ar 16:9",
    "1234567890 3.14159 2nd 20% $5 #tag @name",
    "über naïve café ŒUVRE straße ﬁne İstanbul ſhort",  # noqa: RUF001
    "猫の写真 一只红苹果 빨간 사과 красное яблоко تفاحة حمراء",
    "🍎🍏 👩‍🚀 flag 🇫🇷 e\u0301 a\u030a zero\u200bwidth \ufeffbom no\u00a0break",
    "<|startoftext|> a cat <|endoftext|> a dog </s> <pad> <unk> <extra_id_0>",
    "…—–‘’“”«» ½ ² ™ ° × ≠",  # noqa: RUF001
    "a" * 300,
    "word " * 300,
]


@cache
def packaged(kind: str) -> Tokenizer:
    return Tokenizer.from_str(packaged_json(kind))


@cache
def packaged_json(kind: str) -> str:
    file = files("flux_nf4") / "assets" / "tokenizers" / "flux1" / f"{kind}.json.gz"
    return gzip.decompress(file.read_bytes()).decode()


@cache
def theirs(kind: str):
    state = json.loads(packaged_json(kind))
    if kind == "clip":
        from transformers.models.clip.tokenization_clip import CLIPTokenizer

        merges = [tuple(merge) for merge in state["model"]["merges"]]
        return CLIPTokenizer(vocab=state["model"]["vocab"], merges=merges)
    from transformers.models.t5.tokenization_t5 import T5Tokenizer

    return T5Tokenizer(
        vocab=[tuple(piece) for piece in state["model"]["vocab"]],
        _spm_precompiled_charsmap=base64.b64decode(state["normalizer"]["precompiled_charsmap"]),
    )


@pytest.mark.parametrize("kind", ["t5", "clip"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_prompt_gets_the_ids_of_transformers(kind, prompt):
    assert packaged(kind).encode(prompt).ids == theirs(kind)(prompt)["input_ids"]


@pytest.mark.parametrize("kind", ["t5", "clip"])
@settings(max_examples=300, deadline=None)
@given(prompt=st.text(max_size=60))
def test_any_text_gets_the_ids_of_transformers(kind, prompt):
    assert packaged(kind).encode(prompt).ids == theirs(kind)(prompt)["input_ids"]


@pytest.mark.parametrize(
    ("kind", "prompt", "ids"),
    [
        ("t5", "a red apple", [3, 9, 1131, 8947, 1]),
        ("t5", "", [1]),
        ("clip", "a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407]),
        ("clip", "Hello World!", [49406, 3306, 1002, 256, 49407]),
        ("clip", "", [49406, 49407]),
    ],
)
def test_prompt_gets_the_published_ids(kind, prompt, ids):
    assert packaged(kind).encode(prompt).ids == ids


@pytest.mark.parametrize(("kind", "size"), [("t5", 32100), ("clip", 49408)])
def test_vocabulary_has_its_published_size(kind, size):
    assert packaged(kind).get_vocab_size() == size


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_no_padding_or_truncation_is_baked_in(kind):
    assert (packaged(kind).padding, packaged(kind).truncation) == (None, None)


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_decoding_gives_the_words_back(kind):
    tokenizer = packaged(kind)
    ids = tokenizer.encode("a photo of a red apple").ids
    assert tokenizer.decode(ids).strip() == "a photo of a red apple"


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_decoding_nothing_gives_nothing(kind):
    assert packaged(kind).decode([]) == ""
