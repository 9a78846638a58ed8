"""Quantising and dequantising in plain PyTorch, on values whose result is known."""

import pytest
import torch

from flux_nf4.errors import InputError, ShapeError
from flux_nf4.nf4 import codec, reference
from flux_nf4.nf4.codec import QuantType


def unpack(codes: torch.Tensor) -> torch.Tensor:
    return torch.stack([codes >> 4, codes & 15], dim=1).flatten()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_levels_quantise_to_their_own_codes(quant_type: QuantType) -> None:
    values = codec.levels(quant_type)
    codes = unpack(reference.quantize(values.repeat(1, 4), quant_type=quant_type).codes)
    assert torch.equal(values[codes.int()], values.repeat(4))


def test_high_nibble_holds_the_first_value() -> None:
    w_NK = torch.zeros(1, 64)
    w_NK[0, 0], w_NK[0, 1] = 1, -1
    assert reference.quantize(w_NK).codes[0] == 0xF0


def test_absmax_is_the_largest_magnitude_of_each_block() -> None:
    w_NK = torch.zeros(2, 64)
    w_NK[0, 5], w_NK[1, 60] = -3, 0.25
    assert reference.quantize(w_NK).absmax.tolist() == [3, 0.25]


def test_zero_block_gets_code_seven_and_absmax_zero() -> None:
    weight = reference.quantize(torch.zeros(1, 64))
    assert weight.codes.tolist() == [0x77] * 32
    assert weight.absmax.tolist() == [0]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_zero_block_stays_zero(quant_type: QuantType) -> None:
    weight = reference.quantize(torch.zeros(1, 64), quant_type=quant_type)
    assert not reference.dequantize(weight).any()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_value_on_a_threshold_takes_the_lower_level(quant_type: QuantType) -> None:
    rising = codec.levels(quant_type).sort().values
    midpoints = (rising[:-1] + rising[1:]) / 2
    w_NK = torch.cat([torch.ones(1), midpoints, torch.zeros(48)])[None]
    decoded = reference.dequantize(reference.quantize(w_NK, quant_type=quant_type))
    assert torch.equal(decoded[0, 1:16], rising[:-1])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_rounding_tables_equal_a_binary_search(quant_type: QuantType) -> None:
    rising = codec.levels(quant_type).sort().values
    midpoints = (rising[:-1] + rising[1:]) / 2
    one = torch.ones(())
    nearby = [midpoints, midpoints.nextafter(one), midpoints.nextafter(-one)]
    values = torch.cat([*nearby, torch.linspace(-1, 1, 4096 * 63 - 45)]).view(4096, 63)
    w_NK = torch.cat([torch.ones(4096, 1), values], dim=1)
    decoded = reference.dequantize(reference.quantize(w_NK, quant_type=quant_type))
    assert torch.equal(decoded, rising[torch.bucketize(w_NK, midpoints)])


@pytest.mark.parametrize("absmax", [1e-45, 1e-40, 9e-39, 1.2e-38])
def test_subnormal_blocks_stay_finite(absmax: float) -> None:
    w_NK = torch.linspace(-absmax, absmax, 64)[None]
    decoded = reference.dequantize(reference.quantize(w_NK))
    assert decoded.abs().max() <= w_NK.abs().max()


def test_largest_float32_survives() -> None:
    largest = torch.finfo(torch.float32).max
    decoded = reference.dequantize(reference.quantize(torch.full((1, 64), largest)))
    assert torch.equal(decoded, torch.full((1, 64), largest))


def test_float64_is_rounded_to_float32_first() -> None:
    w_NK = torch.linspace(-1, 1, 128, dtype=torch.float64).view(2, 64)
    ours, theirs = reference.quantize(w_NK), reference.quantize(w_NK.float())
    assert torch.equal(ours.codes, theirs.codes)
    assert ours.dtype == torch.float32


def test_a_transposed_view_quantises_like_its_copy() -> None:
    w_NK = torch.linspace(-1, 1, 128 * 64).view(128, 64).T
    assert torch.equal(reference.quantize(w_NK).codes, reference.quantize(w_NK.contiguous()).codes)


def test_quantising_leaves_the_input_alone() -> None:
    w_NK = torch.linspace(-2, 2, 64)[None]
    before = w_NK.clone()
    reference.quantize(w_NK)
    assert torch.equal(w_NK, before)


def test_a_parameter_can_be_quantised() -> None:
    weight = reference.quantize(torch.nn.Parameter(torch.ones(1, 64)))
    assert not weight.absmax.requires_grad


@pytest.mark.parametrize("nested", [False, True])
def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, nested: bool) -> None:
    w_NK = torch.linspace(-1, 1, 24 * 128).view(24, 128)
    whole = reference.quantize(w_NK, nested=nested)
    whole_values = reference.dequantize(whole)
    monkeypatch.setattr(reference, "_CHUNK", 640)
    parts = reference.quantize(w_NK, nested=nested)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(reference.dequantize(parts), whole_values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_that_are_not_finite_are_counted(bad: float, dtype: torch.dtype) -> None:
    w_NK = torch.zeros(2, 64, dtype=dtype)
    w_NK[0, 3] = w_NK[1, 7] = bad
    with pytest.raises(InputError, match="2 of 128 values are NaN or infinite"):
        reference.quantize(w_NK)


def test_float64_beyond_float32_is_refused() -> None:
    with pytest.raises(InputError, match="64 of 64 values are NaN or infinite in float32"):
        reference.quantize(torch.full((1, 64), 1e300, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_other_types_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=f"not {dtype}"):
        reference.quantize(torch.zeros(1, 64).to(dtype))


@pytest.mark.parametrize("shape", [(), (64,), (1, 1, 64)])
def test_only_matrices_are_quantised(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=f"two dimensions, got {len(shape)}"):
        reference.quantize(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(0, 64), (64, 0)])
def test_empty_weights_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ShapeError, match="holds no values"):
        reference.quantize(torch.zeros(shape))


@pytest.mark.parametrize(("shape", "block_size"), [((3, 100), 64), ((1, 64), 128), ((1, 1), 64)])
def test_partial_blocks_are_refused(shape: tuple[int, int], block_size: int) -> None:
    with pytest.raises(ShapeError, match=f"does not fill blocks of {block_size}"):
        reference.quantize(torch.zeros(shape), block_size=block_size)


def test_rows_may_share_a_block() -> None:
    w_NK = torch.linspace(-1, 1, 128).view(4, 32)
    assert torch.equal(
        reference.dequantize(reference.quantize(w_NK)).view(2, 64),
        reference.dequantize(reference.quantize(w_NK.view(2, 64))),
    )


def test_unknown_block_size_is_refused() -> None:
    with pytest.raises(InputError, match="64 or 128, got 0"):
        reference.quantize(torch.zeros(1, 64), block_size=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_values_are_rounded_once(dtype: torch.dtype) -> None:
    weight = reference.quantize(torch.linspace(-3, 3, 640).view(10, 64))
    exact = codec.levels("nf4")[unpack(weight.codes).int()].view(10, 64)
    exact = exact * weight.float_absmax()[:, None]
    assert torch.equal(reference.dequantize(weight, dtype), exact.to(dtype))


def test_dequantising_defaults_to_the_dtype_before() -> None:
    weight = reference.quantize(torch.ones(1, 64, dtype=torch.float16))
    assert reference.dequantize(weight).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_dequantising_to_other_types_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=f"not {dtype}"):
        reference.dequantize(reference.quantize(torch.ones(1, 64)), dtype)


def test_nesting_subtracts_the_mean() -> None:
    nested = reference.nest_absmax(torch.tensor([1.0, 3.0]))
    assert nested.offset == 2
    assert nested.absmax.tolist() == [1]


def test_nested_extremes_come_back_exactly() -> None:
    absmax_G = torch.tensor([0.5, 2.0, 1.25, 1.25])
    assert reference.nest_absmax(absmax_G).to_float()[1] == 2


def test_equal_absmax_nest_without_loss() -> None:
    absmax_G = torch.full((300,), 0.75)
    assert torch.equal(reference.nest_absmax(absmax_G).to_float(), absmax_G)
