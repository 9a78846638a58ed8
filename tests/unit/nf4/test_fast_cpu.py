"""The short way for bfloat16 gives the reference's bits, whatever the values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from flux_nf4.errors import InputError
from flux_nf4.nf4 import fast_cpu, ops, reference


def from_bits(bits):
    return bits.to(torch.int16).view(torch.bfloat16)


def assert_same_as_reference(w, **options):
    ours, theirs = ops.quantize(w, **options), reference.quantize(w, **options)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.float_absmax(), theirs.float_absmax())
    assert (ours.shape, ours.block_size, ours.dtype, ours.is_nested) == (
        theirs.shape,
        theirs.block_size,
        theirs.dtype,
        theirs.is_nested,
    )


def every_value_under(absmax_bits):
    """Blocks that hold every bfloat16 not above an absmax, which is the first of each."""
    magnitudes = torch.arange(absmax_bits + 1, dtype=torch.int32)
    values = torch.cat([magnitudes, magnitudes - 2**15])
    padding = values.new_zeros(-len(values) % 63)
    blocks = torch.cat([values, padding]).view(-1, 63)
    first = torch.full((len(blocks), 1), absmax_bits, dtype=torch.int32)
    return from_bits(torch.cat([first, blocks], dim=1))


@pytest.mark.parametrize("first_mantissa", range(0, 128, 32))
def test_every_value_under_every_mantissa_is_the_reference_s(first_mantissa):
    exponent = 127 << 7
    w = torch.cat([every_value_under(exponent + first_mantissa + m) for m in range(32)])
    found = fast_cpu.quantize_blocks(w)

    assert found is not None
    assert_same_as_reference(w)


@pytest.mark.parametrize("exponent", [0, 1, 2, 16, 17, 18, 60, 100, 200, 251, 252, 253, 254])
def test_exponents_from_end_to_end_are_the_reference_s(exponent):
    mantissas = range(0, 128, 9)
    assert_same_as_reference(
        torch.cat([every_value_under((exponent << 7) + mantissa) for mantissa in mantissas])
    )


@given(arrays.arrays("int16", (4, 64)))
def test_any_bits_give_what_the_reference_gives(values):
    w = from_bits(torch.from_numpy(values))
    if w.isfinite().all():
        assert_same_as_reference(w)
    else:
        with pytest.raises(InputError):
            ops.quantize(w)


@given(st.integers(1, 70), st.sampled_from([64, 128]), st.booleans(), st.integers(0, 2**31))
def test_any_shape_gives_what_the_reference_gives(num_out, block_size, nested, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(num_out, 192 * 2, generator=generator).bfloat16()
    assert_same_as_reference(w, block_size=block_size, nested=nested)


def test_the_default_device_changes_nothing():
    w = torch.randn(2, 64).bfloat16()
    fast_cpu._table.cache_clear()
    with torch.device("meta"):
        found = ops.quantize(w)
    assert torch.equal(found.codes, reference.quantize(w).codes)


def test_blocks_of_zeros_of_either_sign_are_the_reference_s():
    w = torch.zeros(3, 64, dtype=torch.bfloat16)
    w[1] = -0.0
    w[2, ::2] = -0.0
    assert_same_as_reference(w)


def test_more_than_one_chunk_is_the_reference_s():
    assert_same_as_reference(torch.randn(300, 1920).bfloat16())


def test_a_view_that_is_not_contiguous_is_the_reference_s():
    assert_same_as_reference(torch.randn(128, 192).bfloat16().t())
