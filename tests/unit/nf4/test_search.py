"""The search for scales: how near to the best there is, and never worse than absmax."""

from dataclasses import replace

import pytest
import torch
from tolerances import SEARCH_EXCESS, SEARCHED_GAUSSIAN_ERROR

from benchmarks.scale_search import least_errors
from flux_nf4.errors import InputError, ShapeError
from flux_nf4.nf4 import codec, reference
from flux_nf4.nf4.search import quantize_searched

GENERATOR = torch.Generator().manual_seed(0)
GAUSSIAN_NK = torch.randn(64, 512, generator=GENERATOR)
WEIGHTS = {
    "gaussian": GAUSSIAN_NK,
    "uniform": torch.rand(64, 512, generator=GENERATOR) * 2 - 1,
    "heavy-tailed": GAUSSIAN_NK**3,
    "lopsided": GAUSSIAN_NK.exp(),
    "levels": codec.levels("nf4").repeat(64, 32) * 0.01,
    "ones": torch.ones(64, 512),
    "one value a block": torch.eye(64).repeat(1, 8),
    "zeros": torch.zeros(64, 512),
    "smallest": GAUSSIAN_NK * 1e-40,
    "largest": torch.full((64, 512), torch.finfo(torch.float32).max),
}


def errors(w_NK, weight):
    """The squared error of every block: (G,) float64."""
    decoded = reference.dequantize(weight, torch.float32).double()
    return (decoded - w_NK.double()).square().view(-1, weight.block_size).sum(dim=1)


def relative_error(w_NK, weight):
    return float((errors(w_NK, weight).sum() / w_NK.double().square().sum()).sqrt())


def test_gaussian_weights_reach_the_target():
    w_NK = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))

    assert relative_error(w_NK, quantize_searched(w_NK)) <= SEARCHED_GAUSSIAN_ERROR


@pytest.mark.parametrize("name", ["gaussian", "uniform", "heavy-tailed", "lopsided"])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("signed", [False, True])
def test_the_error_is_nearly_the_least_there_is(name, block_size, signed):
    w_NK = WEIGHTS[name]
    weight = quantize_searched(w_NK, block_size=block_size, signed=signed)
    least = least_errors(w_NK, block_size, signed=signed).sum()

    assert least <= errors(w_NK, weight).sum() <= least * (1 + SEARCH_EXCESS)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_no_block_is_worse_than_by_absmax(name, quant_type):
    w_NK = WEIGHTS[name]
    searched = errors(w_NK, quantize_searched(w_NK, quant_type=quant_type))
    by_absmax = errors(w_NK, reference.quantize(w_NK, quant_type=quant_type))

    assert bool((searched <= by_absmax).all())


@pytest.mark.parametrize("name", ["levels", "zeros"])
def test_blocks_without_an_error_keep_their_bytes(name):
    by_absmax = reference.quantize(WEIGHTS[name])
    searched = quantize_searched(WEIGHTS[name])

    assert torch.equal(searched.codes, by_absmax.codes)
    assert torch.equal(searched.float_absmax(), by_absmax.float_absmax())


def test_a_negative_scale_is_used_where_it_is_better():
    assert (quantize_searched(GAUSSIAN_NK).float_absmax() < 0).any()


def test_unsigned_scales_are_positive():
    assert (quantize_searched(GAUSSIAN_NK, signed=False).float_absmax() > 0).all()


def test_nested_statistics_keep_the_gain():
    searched = quantize_searched(GAUSSIAN_NK, signed=False)
    nested = replace(searched, absmax=reference.nest_absmax(searched.float_absmax()))
    by_absmax = reference.quantize(GAUSSIAN_NK, nested=True)

    assert relative_error(GAUSSIAN_NK, nested) < 0.95 * relative_error(GAUSSIAN_NK, by_absmax)


def test_the_bytes_are_as_many_as_by_absmax():
    searched, by_absmax = quantize_searched(GAUSSIAN_NK), reference.quantize(GAUSSIAN_NK)

    assert searched.num_bytes == by_absmax.num_bytes


def test_bf16_gives_what_its_values_in_float32_give():
    w_NK = GAUSSIAN_NK.bfloat16()
    weight, widened = quantize_searched(w_NK), quantize_searched(w_NK.float())

    assert torch.equal(weight.codes, widened.codes)
    assert torch.equal(weight.float_absmax(), widened.float_absmax())
    assert weight.dtype == torch.bfloat16


def test_rows_are_quantised_alike_alone_and_among_others():
    w_NK = torch.randn(48, 8192, generator=torch.Generator().manual_seed(1))
    whole, part = quantize_searched(w_NK).rows(40, 48), quantize_searched(w_NK[40:])

    assert torch.equal(whole.codes, part.codes)
    assert torch.equal(whole.float_absmax(), part.float_absmax())


def test_a_transposed_view_gives_what_its_copy_gives():
    searched = quantize_searched(GAUSSIAN_NK.T)

    assert torch.equal(searched.codes, quantize_searched(GAUSSIAN_NK.T.contiguous()).codes)


def test_the_weight_is_left_as_it_was():
    w_NK = GAUSSIAN_NK.clone()
    quantize_searched(w_NK)

    assert torch.equal(w_NK, GAUSSIAN_NK)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_refused(value):
    w_NK = GAUSSIAN_NK.clone()
    w_NK[3, 7] = value

    with pytest.raises(InputError, match="1 of 32768 values are NaN or infinite"):
        quantize_searched(w_NK)


def test_a_matrix_that_does_not_fill_its_blocks_is_refused():
    with pytest.raises(ShapeError, match="does not fill blocks of 64"):
        quantize_searched(torch.ones(3, 32))
