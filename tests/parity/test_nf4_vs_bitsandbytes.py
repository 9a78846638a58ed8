"""Codes, absmax, nested statistics and decoded values, bit for bit those of bitsandbytes on a CPU.

Exact: no tolerance. The hard values are put there on purpose: each threshold and its neighbours,
equal values, zeros, whole blocks of zeros, outliers, and scales from 1e-30 to 1e30.
"""

import bitsandbytes.functional as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flux_nf4.nf4 import codec, ops, reference
from flux_nf4.nf4.codec import NestedAbsmax, NF4Weight, QuantType

QUANT_TYPES: list[QuantType] = ["nf4", "fp4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def hard_values(quant_type: QuantType) -> Tensor:
    """Levels and thresholds with their float32 neighbours, and what else may go wrong."""
    rising = codec.levels(quant_type).sort().values
    edges = torch.cat([rising, (rising[:-1] + rising[1:]) / 2])
    neighbours = [edges.nextafter(torch.tensor(side)) for side in (-2.0, 2.0)]
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-45, 1.0, -1.0])
    return torch.cat([edges, *neighbours, special]).clamp(-1, 1)


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, int, QuantType]:
    block_size = draw(st.sampled_from([64, 128]))
    quant_type = draw(st.sampled_from(QUANT_TYPES))
    blocks_per_row = draw(st.integers(1, 5))
    num_out = draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (num_out * blocks_per_row, block_size)
    w_GS = torch.randn(shape, generator=generator)
    if draw(st.booleans()):
        pool = hard_values(quant_type)
        w_GS = pool[torch.randint(len(pool), shape, generator=generator)]
        w_GS[:, 0] = 1
    exponent = torch.rand(shape[0], 1, generator=generator) * draw(st.sampled_from([0, 2, 60]))
    w_GS = w_GS * 10 ** (exponent - exponent.max() / 2)
    w_GS[torch.rand(shape[0], generator=generator) < 0.1] = 0
    dtype = draw(st.sampled_from(DTYPES))
    w_NK = w_GS.view(num_out, -1).to(dtype).nan_to_num()
    return w_NK, block_size, quant_type


def bitsandbytes_weight(
    w_NK: Tensor, block_size: int, quant_type: QuantType, *, nested: bool
) -> tuple[NF4Weight, Tensor]:
    """What bitsandbytes makes of a weight, in our form, and what it decodes it to."""
    packed, state = oracle.quantize_4bit(
        w_NK, blocksize=block_size, quant_type=quant_type, compress_statistics=nested
    )
    absmax: Tensor | NestedAbsmax = state.absmax
    if nested:
        absmax = NestedAbsmax(
            codes=state.absmax,
            absmax=state.state2.absmax,
            levels=state.state2.code,
            offset=float(state.offset),
            block_size=state.state2.blocksize,
        )
    weight = NF4Weight(
        codes=packed.flatten(),
        absmax=absmax,
        shape=(w_NK.shape[0], w_NK.shape[1]),
        block_size=block_size,
        quant_type=quant_type,
        dtype=w_NK.dtype,
    )
    return weight, oracle.dequantize_4bit(packed, state)


@settings(deadline=None, max_examples=150)
@given(weights())
def test_codes_and_absmax_equal(case: tuple[Tensor, int, QuantType]) -> None:
    w_NK, block_size, quant_type = case
    ours = reference.quantize(w_NK, block_size=block_size, quant_type=quant_type)
    theirs, _ = bitsandbytes_weight(w_NK, block_size, quant_type, nested=False)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.float_absmax(), theirs.float_absmax())


@settings(deadline=None, max_examples=150)
@given(weights())
def test_nested_statistics_equal(case: tuple[Tensor, int, QuantType]) -> None:
    w_NK, block_size, quant_type = case
    ours = reference.quantize(w_NK, block_size=block_size, quant_type=quant_type, nested=True)
    theirs, _ = bitsandbytes_weight(w_NK, block_size, quant_type, nested=True)
    assert isinstance(ours.absmax, NestedAbsmax)
    assert isinstance(theirs.absmax, NestedAbsmax)
    assert torch.equal(ours.absmax.codes, theirs.absmax.codes)
    assert torch.equal(ours.absmax.absmax, theirs.absmax.absmax)
    assert torch.equal(ours.absmax.levels, theirs.absmax.levels)
    assert ours.absmax.offset == theirs.absmax.offset


@settings(deadline=None, max_examples=150)
@given(weights(), st.booleans())
def test_decoded_values_equal(case: tuple[Tensor, int, QuantType], nested: bool) -> None:
    w_NK, block_size, quant_type = case
    theirs, decoded = bitsandbytes_weight(w_NK, block_size, quant_type, nested=nested)
    assert torch.equal(ops.dequantize(theirs), decoded)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_levels_equal(quant_type: QuantType) -> None:
    theirs = oracle.get_4bit_type(quant_type, device="cpu")
    assert torch.equal(codec.levels(quant_type).view(torch.int32), theirs.view(torch.int32))


def test_dynamic_map_equals() -> None:
    assert torch.equal(codec.dynamic_map(), oracle.create_dynamic_map())


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_a_whole_layer_equals(quant_type: QuantType, nested: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    w_NK = (torch.randn(768, 1024, generator=generator) * 0.02).bfloat16()
    ours = reference.quantize(w_NK, quant_type=quant_type, nested=nested)
    theirs, decoded = bitsandbytes_weight(w_NK, 64, quant_type, nested=nested)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ops.dequantize(ours), decoded)


def test_nested_codes_equal_over_the_whole_range() -> None:
    absmax_G = torch.cat([torch.linspace(-1, 1, 2**17), torch.logspace(-9, 0, 2**14)])
    theirs, state = oracle.quantize_blockwise(absmax_G - absmax_G.mean(), blocksize=256)
    ours = reference.nest_absmax(absmax_G)
    assert torch.equal(ours.codes, theirs)
    assert torch.equal(ours.absmax, state.absmax)


def test_zero_block_has_the_bytes_of_bitsandbytes() -> None:
    theirs, _ = bitsandbytes_weight(torch.zeros(1, 64), 64, "nf4", nested=False)
    assert theirs.codes.tolist() == [0x77] * 32
