"""Sizes are read off names and shapes; impossible ones are refused."""

from dataclasses import replace

import pytest
import torch
from tiny_config import tiny

from flux_nf4.errors import FormatError
from flux_nf4.model.config import FluxConfig
from flux_nf4.model.sizes import count_blocks, flux_config


def with_entry(component, name, value):
    return replace(component, entries={**component.entries, name: value})


@pytest.mark.parametrize(
    "config",
    [
        tiny(),
        tiny(num_heads=3, num_double_blocks=3, num_single_blocks=1),
        tiny(num_double_blocks=0),
        tiny(num_single_blocks=0),
        tiny(in_channels=384, guidance_embed=False),
        FluxConfig(
            hidden_size=256, num_heads=2, num_double_blocks=1, num_single_blocks=1,
            context_dim=48, pooled_dim=40, out_channels=32,
        ),
    ],
    ids=range(6),
)  # fmt: skip
def test_config_is_found_again(config, make_transformer):
    assert flux_config(make_transformer(config)) == config


def test_a_gap_among_the_blocks_is_named(make_transformer):
    component = make_transformer(tiny(num_single_blocks=4))
    entries = {
        name: entry
        for name, entry in component.entries.items()
        if not name.startswith(("single_blocks.1.", "single_blocks.2."))
    }
    with pytest.raises(FormatError, match=r"`single_blocks` up to 3 but lacks 2 of them: 1, 2"):
        flux_config(replace(component, entries=entries))


def test_a_block_number_beyond_all_reason_costs_no_time(make_transformer):
    component = with_entry(make_transformer(), "single_blocks.99999.x", torch.zeros(1))
    with pytest.raises(FormatError, match="up to 99999 but lacks 99997 of them"):
        count_blocks(component, "single_blocks")


@pytest.mark.parametrize("digits", [6, 5000])
def test_a_block_number_of_many_digits_is_no_block(make_transformer, digits):
    name = f"single_blocks.{'9' * digits}.x"
    component = with_entry(make_transformer(), name, torch.zeros(1))
    assert count_blocks(component, "single_blocks") == 2


@pytest.mark.parametrize("head_dim", [1, 24, 63, 65, 4096])
def test_a_head_that_cannot_be_divided_is_refused(make_transformer, head_dim):
    name = "double_blocks.0.img_attn.norm.query_norm.scale"
    component = with_entry(make_transformer(), name, torch.ones(head_dim))
    with pytest.raises(FormatError, match=f"heads of {head_dim} channels"):
        flux_config(component)


@pytest.mark.parametrize("shape", [(), (128,), (0, 64), (128, 0), (128, 64, 1)])
def test_a_matrix_of_another_form_is_refused(make_transformer, shape):
    component = with_entry(make_transformer(), "img_in.weight", torch.zeros(shape))
    with pytest.raises(FormatError, match="it must have 2 axes"):
        flux_config(component)
