"""What must hold of NF4 whatever the weight: no oracle, only invariants."""

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flux_nf4.nf4 import codec, reference
from flux_nf4.nf4.codec import NF4Weight, QuantType, concatenate_rows

SETTINGS = settings(deadline=None, max_examples=60)


@st.composite
def quantised(draw: st.DrawFn, forms: Sequence[str] = ("v1", "v2")) -> tuple[Tensor, NF4Weight]:
    block_size = draw(st.sampled_from([64, 128]))
    quant_type: QuantType = draw(st.sampled_from(["nf4", "fp4"]))
    shape = (draw(st.integers(1, 12)), block_size * draw(st.integers(1, 4)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    w_NK = torch.randn(shape, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 1e3]))
    w_NK = w_NK.to(dtype)
    weight = reference.quantize(
        w_NK,
        block_size=block_size,
        quant_type=quant_type,
        nested=draw(st.sampled_from(forms)) == "v1",
    )
    return w_NK, weight


@st.composite
def any_codes(draw: st.DrawFn) -> NF4Weight:
    """Weights that no quantiser made: any byte, any positive absmax."""
    num_out = draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    codes_P = torch.randint(256, (num_out * 64,), generator=generator, dtype=torch.uint8)
    absmax_G = torch.rand(num_out * 2, generator=generator) + 0.1
    return NF4Weight(codes=codes_P, absmax=absmax_G, shape=(num_out, 128), dtype=torch.float32)


def blocks(values: Tensor, weight: NF4Weight) -> Tensor:
    return values.float().view(-1, weight.block_size)


@SETTINGS
@given(quantised())
def test_no_value_moves_further_than_half_the_widest_gap(case: tuple[Tensor, NF4Weight]) -> None:
    w_NK, weight = case
    decoded = reference.dequantize(weight.with_float_absmax(), torch.float32)
    half_gap = codec.levels(weight.quant_type).sort().values.diff().max() / 2
    largest = blocks(w_NK, weight).abs().amax(dim=1)
    # Nested absmax differs from the true one, by at most half a step of the dynamic map.
    slack = (weight.float_absmax() - largest).abs()
    error = (blocks(decoded, weight) - blocks(w_NK, weight)).abs().amax(dim=1)
    one_rounding = 1 + torch.finfo(torch.float32).eps * 4
    assert (error <= (half_gap * largest + slack) * one_rounding).all()


@SETTINGS
@given(quantised(forms=("v2",)))
def test_the_largest_of_a_block_keeps_its_magnitude(case: tuple[Tensor, NF4Weight]) -> None:
    w_NK, weight = case
    largest = blocks(reference.dequantize(weight), weight).abs().amax(dim=1)
    assert torch.equal(largest, blocks(w_NK, weight).abs().amax(dim=1))


@SETTINGS
@given(quantised())
def test_quantising_twice_changes_nothing(case: tuple[Tensor, NF4Weight]) -> None:
    _, weight = case
    flat = weight.with_float_absmax()
    decoded = reference.dequantize(flat, torch.float32)
    again = reference.quantize(decoded, block_size=weight.block_size, quant_type=weight.quant_type)
    assert torch.equal(reference.dequantize(again), decoded)


@SETTINGS
@given(quantised())
def test_absmax_does_not_depend_on_signs(case: tuple[Tensor, NF4Weight]) -> None:
    w_NK, weight = case
    negated = reference.quantize(-w_NK, block_size=weight.block_size, quant_type=weight.quant_type)
    plain = reference.quantize(w_NK, block_size=weight.block_size, quant_type=weight.quant_type)
    assert torch.equal(negated.float_absmax(), plain.float_absmax())


@SETTINGS
@given(any_codes(), st.data())
def test_rows_of_the_decoded_are_the_decoded_of_rows(
    weight: NF4Weight, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, weight.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, weight.shape[0]))
    expected = reference.dequantize(weight)[start:stop]
    assert torch.equal(reference.dequantize(weight.rows(start, stop)), expected)


@SETTINGS
@given(st.lists(any_codes(), min_size=1, max_size=4))
def test_joining_then_cutting_gives_the_parts_back(parts: list[NF4Weight]) -> None:
    joined, start = concatenate_rows(parts), 0
    for part in parts:
        cut = joined.rows(start, start + part.shape[0])
        assert torch.equal(cut.codes, part.codes)
        assert torch.equal(cut.float_absmax(), part.float_absmax())
        start += part.shape[0]


@SETTINGS
@given(quantised())
def test_un_nesting_changes_no_value(case: tuple[Tensor, NF4Weight]) -> None:
    _, weight = case
    expected = reference.dequantize(weight)
    assert torch.equal(reference.dequantize(weight.with_float_absmax()), expected)


@SETTINGS
@given(any_codes(), st.sampled_from([torch.bfloat16, torch.float16, torch.float64]))
def test_every_dtype_is_the_float32_value_rounded(weight: NF4Weight, dtype: torch.dtype) -> None:
    exact = reference.dequantize(weight, torch.float32)
    assert torch.equal(reference.dequantize(weight, dtype), exact.to(dtype))
