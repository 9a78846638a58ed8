"""How the sixteen levels come about, as docs/nf4.md tells it."""

from itertools import pairwise
from statistics import NormalDist

import pytest
from tolerances import LEVEL_FP32

from flux_nf4.nf4.codec import NF4_LEVELS

# QLoRA (arXiv 2305.14314): the middle between 1 - 1/30 and 1 - 1/32.
HIGHEST_QUANTILE = 0.9677083


def test_levels_are_even_quantiles_seven_below_zero_and_eight_above():
    quantile = NormalDist().inv_cdf
    largest, share = quantile(HIGHEST_QUANTILE), HIGHEST_QUANTILE - 0.5
    above = [quantile(0.5 + share * step / 8) / largest for step in range(1, 9)]
    below = [-quantile(0.5 + share * step / 7) / largest for step in range(7, 0, -1)]

    assert pytest.approx([*below, 0, *above], abs=LEVEL_FP32) == NF4_LEVELS


@pytest.mark.parametrize(("first", "last", "percent"), [(0, 7, 6.7), (7, 15, 5.8)])
def test_between_neighbours_lie_equal_shares(first, last, percent):
    width = NormalDist().inv_cdf(HIGHEST_QUANTILE)
    edges = [NormalDist().cdf(level * width) for level in NF4_LEVELS[first : last + 1]]

    assert {round(100 * (high - low), 1) for low, high in pairwise(edges)} == {percent}
