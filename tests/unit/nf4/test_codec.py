"""The in-memory form: its tables, its checks, and the moves that must not change a value."""

import dataclasses
from dataclasses import replace

import pytest
import torch

from flux_nf4.errors import InputError, ShapeError
from flux_nf4.nf4 import codec, reference
from flux_nf4.nf4.codec import NestedAbsmax, NF4Weight, concatenate_rows


def random_weight(num_out: int = 6, num_in: int = 128, *, nested: bool = False) -> NF4Weight:
    generator = torch.Generator().manual_seed(num_out * 1000 + num_in)
    w_NK = torch.randn(num_out, num_in, generator=generator)
    return reference.quantize(w_NK, nested=nested)


def test_nf4_levels_rise_from_minus_one_to_one() -> None:
    values = codec.levels("nf4")
    assert values[0] == -1
    assert values[-1] == 1
    assert values.diff().min() > 0


def test_nf4_code_seven_is_zero() -> None:
    assert codec.levels("nf4")[7] == 0


def test_fp4_codes_are_a_sign_above_three_magnitude_bits() -> None:
    values = codec.levels("fp4")
    assert torch.equal(values[8:], -values[:8])


def test_both_fp4_zeros_are_positive() -> None:
    assert not codec.levels("fp4")[[0, 8]].signbit().any()


def test_dynamic_map_has_256_rising_values() -> None:
    values = codec.dynamic_map()
    assert values.shape == (256,)
    assert values.diff().min() > 0


def test_dynamic_map_is_symmetric_but_for_one() -> None:
    values = codec.dynamic_map()
    assert torch.equal(values[:127], -values[128:255].flip(0))
    assert values[255] == 1


def test_tables_lie_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        devices = {codec.levels("nf4").device.type, codec.dynamic_map().device.type}
    assert devices == {"cpu"}


def test_fp4_magnitudes_are_twelfths_in_float32() -> None:
    twelfths = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3])
    assert torch.equal(codec.levels("fp4")[:8], twelfths / 12)


def test_unknown_quant_type_is_named() -> None:
    with pytest.raises(InputError, match="`nf4` or `fp4`, got 'int4'"):
        codec.levels("int4")


def test_num_bytes_counts_codes_and_absmax() -> None:
    assert random_weight(6, 128).num_bytes == 6 * 128 // 2 + 12 * 4


def test_num_bytes_of_nested_counts_every_table() -> None:
    weight = random_weight(6, 128, nested=True)
    assert weight.num_bytes == 6 * 128 // 2 + 12 + 1 * 4 + 256 * 4


def test_is_nested_tells_v1_from_v2() -> None:
    assert [random_weight(nested=nested).is_nested for nested in (False, True)] == [False, True]


def test_to_moves_every_tensor() -> None:
    moved = random_weight(nested=True).to("meta")
    assert isinstance(moved.absmax, NestedAbsmax)
    tensors = (moved.codes, moved.absmax.codes, moved.absmax.absmax, moved.absmax.levels)
    assert {tensor.device.type for tensor in tensors} == {moved.device.type} == {"meta"}


@pytest.mark.parametrize("nested", [False, True])
def test_rows_decode_to_the_same_rows(nested: bool) -> None:
    weight = random_weight(6, 128, nested=nested)
    expected = reference.dequantize(weight)[2:5]
    assert torch.equal(reference.dequantize(weight.rows(2, 5)), expected)


def test_rows_share_memory() -> None:
    weight = random_weight(6, 128)
    assert weight.rows(1, 3).codes.data_ptr() == weight.codes.data_ptr() + 64


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 7), (3, 3), (4, 2)])
def test_rows_outside_the_matrix_are_refused(start: int, stop: int) -> None:
    with pytest.raises(InputError, match=f"rows {start} to {stop} are not within 0 to 6"):
        random_weight(6, 128).rows(start, stop)


def test_rows_that_share_a_block_cannot_be_cut() -> None:
    with pytest.raises(ShapeError, match="rows of 96 values do not end where blocks of 64 do"):
        random_weight(2, 96).rows(0, 1)


@pytest.mark.parametrize("nested", [False, True])
def test_concatenated_rows_decode_to_the_parts(nested: bool) -> None:
    parts = [random_weight(num_out, 128, nested=nested) for num_out in (1, 6, 3)]
    expected = torch.cat([reference.dequantize(part) for part in parts])
    assert torch.equal(reference.dequantize(concatenate_rows(parts)), expected)


def test_concatenating_undoes_cutting() -> None:
    weight = random_weight(6, 128)
    joined = concatenate_rows([weight.rows(0, 1), weight.rows(1, 4), weight.rows(4, 6)])
    assert torch.equal(joined.codes, weight.codes)


def test_one_part_is_un_nested_like_several() -> None:
    assert not concatenate_rows([random_weight(nested=True)]).is_nested


def test_concatenating_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="no parts"):
        concatenate_rows([])


def test_parts_of_different_width_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"different lengths: \[64, 128\]"):
        concatenate_rows([random_weight(2, 128), random_weight(2, 64)])


def test_parts_of_different_dtype_are_refused() -> None:
    weight = random_weight()
    with pytest.raises(InputError, match="differ in block size, quant_type or dtype"):
        concatenate_rows([weight, replace(weight, dtype=torch.float16)])


def test_with_float_absmax_decodes_to_the_same_values() -> None:
    weight = random_weight(40, 512, nested=True)
    flat = weight.with_float_absmax()
    assert not flat.is_nested
    assert torch.equal(reference.dequantize(flat), reference.dequantize(weight))


def test_a_weight_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        random_weight().block_size = 128  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (6, 64)}, r"codes must have shape \(192,\), got \(384,\)"),
        ({"absmax": torch.ones(11)}, r"absmax must have shape \(12,\), got \(11,\)"),
        ({"codes": torch.zeros(384, 1, dtype=torch.uint8)}, r"got \(384, 1\)"),
        ({"shape": (3, 3)}, "3 x 3 does not fill blocks of 64"),
        ({"shape": (0, 64)}, "0 x 64 holds no values"),
        ({"shape": (6, 2, 64)}, "two dimensions, got 3"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        replace(random_weight(), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 32}, "block_size must be 64 or 128, got 32"),
        ({"quant_type": "int8"}, "got 'int8'"),
        ({"dtype": torch.int8}, r"not torch\.int8"),
        ({"absmax": torch.ones(12, dtype=torch.float16)}, r"torch\.float32, got torch\.float16"),
        ({"codes": torch.zeros(384, dtype=torch.int8)}, r"torch\.uint8, got torch\.int8"),
        ({"absmax": torch.ones(12, device="meta")}, "codes lie on cpu, absmax on meta"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(random_weight(), **change)  # type: ignore[arg-type]


def nested_absmax(**changes: object) -> NestedAbsmax:
    fields: dict[str, object] = {
        "codes": torch.zeros(300, dtype=torch.uint8),
        "absmax": torch.ones(2),
        "levels": codec.dynamic_map(),
        "offset": 0.5,
    }
    return NestedAbsmax(**fields | changes)  # type: ignore[arg-type]


def test_nested_statistics_of_a_partial_block_are_accepted() -> None:
    assert nested_absmax().to_float().shape == (300,)


def test_nested_absmax_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"nested absmax must have shape \(2,\), got \(1,\)"):
        nested_absmax(absmax=torch.ones(1))


def test_nested_levels_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"nested levels must have shape \(256,\)"):
        nested_absmax(levels=torch.ones(16))


def test_nested_statistics_on_two_devices_are_refused() -> None:
    with pytest.raises(InputError, match="several devices"):
        nested_absmax(absmax=torch.ones(2, device="meta"))


def test_a_nested_block_size_of_zero_is_refused() -> None:
    with pytest.raises(InputError, match="must be positive, got 0"):
        nested_absmax(block_size=0)


def test_nested_codes_must_cover_the_weight() -> None:
    with pytest.raises(ShapeError, match=r"nested codes must have shape \(12,\), got \(300,\)"):
        replace(random_weight(), absmax=nested_absmax())
