import json

import pytest

from flux_nf4.cli import words
from flux_nf4.cli.words import Words, load_words
from flux_nf4.errors import FormatError, ModelNotFoundError

KNOWN = Words(
    things={
        "dog": ("puppy",),
        "hot dog": (),
        "t-rex": ("tyrannosaurus",),
        "wolf": (),
        "mouse": ("mice",),
        "box": (),
        "cherry": (),
        "knife": (),
        "happy face": (),
    }
)


@pytest.mark.parametrize(
    "prompt",
    [
        *("a dog", "A DOG!", "two dogs", "puppies", "a hot cat and a dog", "a t-rex", "a T Rex"),
        *("wolves", "mice", "boxes", "cherries", "knives", "happy faces"),
    ],
)
def test_a_prompt_with_a_thing_in_it_is_known(prompt):
    assert KNOWN.unknown([prompt]) == []


def test_a_prompt_without_a_whole_name_in_it_is_unknown():
    prompts = ["hotdog doghouse", "happy", "", "face of a rex"]

    assert KNOWN.unknown(["a dog", *prompts]) == prompts


def test_matching_looks_at_every_name():
    assert list(KNOWN.matching("PUP")) == ["dog"]


@pytest.fixture
def word_file(tmp_path, monkeypatch):
    """A package whose only content is the demo model's list of words."""
    path = tmp_path / "assets" / "demo" / "words.json"
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(words.resources, "files", lambda package: tmp_path)
    return path


def test_the_file_is_read_whole(word_file):
    lists = ("backgrounds", "tints", "places", "relations", "counts", "sizes")
    word_file.write_text(json.dumps({"things": {"dog": ["dogs"]}, **{n: [n] for n in lists}}))

    assert load_words() == Words(things={"dog": ("dogs",)}, **{name: (name,) for name in lists})


def test_an_installation_without_the_demo_model_says_so(word_file):
    with pytest.raises(ModelNotFoundError, match="no built-in demo model"):
        load_words()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"things": []}', '{"things": {"a": 3}}'])
def test_a_damaged_list_of_words_is_a_format_error(word_file, text):
    word_file.write_text(text)

    with pytest.raises(FormatError, match="is damaged"):
        load_words()
