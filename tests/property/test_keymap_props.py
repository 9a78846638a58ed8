"""The names are a bijection for any number of blocks and levels."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_nf4.formats.keymap import (
    all_in_one_table,
    clip_table,
    t5_table,
    table_for,
    transformer_table,
    vae_table,
)

COUNTS = st.integers(0, 12)
DIALECTS = st.sampled_from(["bfl", "diffusers"])
TABLES = st.one_of(
    st.tuples(st.just("transformer"), st.builds(transformer_table, COUNTS, COUNTS, DIALECTS)),
    st.tuples(st.just("vae"), st.builds(vae_table, st.integers(1, 6), st.integers(1, 4), DIALECTS)),
    st.tuples(st.just("t5"), st.builds(t5_table, COUNTS)),
    st.tuples(st.just("clip"), st.builds(clip_table, COUNTS, flattened=st.booleans())),
)


@settings(max_examples=60, deadline=None)
@given(kind_and_table=TABLES)
def test_no_name_of_a_dialect_stands_for_two(kind_and_table):
    _, table = kind_and_table
    assert len(table.inverse()) == sum(len(names) for names in table.names.values())


@settings(max_examples=60, deadline=None)
@given(kind_and_table=TABLES)
def test_every_name_finds_its_way_there_and_back(kind_and_table):
    _, table = kind_and_table
    for name, (canonical, part) in table.inverse().items():
        assert table.names[canonical][part] == name


@settings(max_examples=60, deadline=None)
@given(kind_and_table=TABLES)
def test_a_table_is_found_again_by_its_names(kind_and_table):
    kind, table = kind_and_table
    assert table_for(kind, set(table.inverse())) == table


@settings(max_examples=60, deadline=None)
@given(kind_and_table=TABLES, kind=st.sampled_from(["transformer", "t5", "clip", "vae"]))
def test_any_names_give_some_table(kind_and_table, kind):
    _, table = kind_and_table
    assert table_for(kind, set(table.inverse())).names


@settings(max_examples=40, deadline=None)
@given(levels=st.integers(1, 6), resnets=st.integers(1, 4))
def test_the_vae_goes_to_bfl_and_back(levels, resnets):
    there = all_in_one_table("vae", vae_table(levels, resnets, "diffusers").names)
    back = table_for("vae", set(there.inverse()))
    assert back.names == there.names


@pytest.mark.parametrize("kind", ["transformer", "t5", "clip", "vae"])
@settings(max_examples=60, deadline=None)
@given(names=st.sets(st.text(max_size=30), max_size=8))
def test_arbitrary_names_never_break_the_table(kind, names):
    table = table_for(kind, names)
    assert table.required(names) <= table.names.keys()
