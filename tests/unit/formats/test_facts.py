import json

import pytest

from flux_nf4.errors import FormatError
from flux_nf4.formats.facts import FLUX_1_DEV, FLUX_1_SCHNELL, METADATA_KEY, Facts


@pytest.mark.parametrize("facts", [FLUX_1_DEV, FLUX_1_SCHNELL, Facts(name="x", shift=1.5)])
def test_facts_survive_the_metadata(facts):
    assert Facts.from_metadata(facts.to_metadata()) == facts


def test_metadata_without_facts_gives_none():
    assert Facts.from_metadata({"format": "pt"}) is None


def test_absent_entries_keep_their_defaults():
    assert Facts.from_metadata({METADATA_KEY: '{"name": "x"}'}) == Facts(name="x")


def test_a_whole_number_serves_where_a_fraction_is_asked_for():
    facts = Facts.from_metadata({METADATA_KEY: '{"shift": 3}'})
    assert facts is not None
    assert type(facts.shift) is float


@pytest.mark.parametrize(
    "values",
    [
        {"unknown": 1},
        {"default_size": "1024"},
        {"default_size": True},
        {"default_size": 0},
        {"default_size": -8},
        {"default_size": 10**12},
        {"default_size": 1024.0},
        {"shift": 10**400},
        {"shift": -1.0},
        {"vae_scaling_factor": 0.0},
        {"vae_norm_num_groups": 0},
        {"use_dynamic_shifting": 1},
        {"tokenizer": "../../etc"},
        {"tokenizer": "a/b"},
        {"tokenizer": ""},
        {"name": "a\nb"},
        {"name": "\x1b[31m"},
        ["name"],
        None,
    ],
    ids=repr,
)
def test_facts_that_cannot_be_are_refused(values):
    with pytest.raises(FormatError, match="metadata `flux_nf4`"):
        Facts.from_metadata({METADATA_KEY: json.dumps(values)})


@pytest.mark.parametrize("text", ["", "{", '{"shift": NaN}', '{"name": "a", "name": "b"}'])
def test_facts_that_are_not_json_are_refused(text):
    with pytest.raises(FormatError, match="metadata `flux_nf4`"):
        Facts.from_metadata({METADATA_KEY: text})


def test_a_negative_vae_shift_is_allowed():
    assert Facts(vae_shift_factor=-0.25).vae_shift_factor == -0.25
