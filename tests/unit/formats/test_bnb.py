import dataclasses
import json

import pytest
import torch

from flux_nf4.errors import FormatError, InputError
from flux_nf4.formats.bnb import (
    check_absmax_is_finite,
    check_is_finite,
    state_bytes,
    tensors_from_weight,
    weight_from_tensors,
)
from flux_nf4.formats.keymap import split_companion
from flux_nf4.nf4 import reference

STATE = "quant_state.bitsandbytes__nf4"


def make(**options):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8, 128, generator=generator, dtype=torch.float32).bfloat16()
    return reference.quantize(values, **options)


def on_disk(**options):
    """The codes and the companions (suffix -> tensor) of a weight called X.weight."""
    tensors = tensors_from_weight("X.weight", make(**options))
    codes = tensors.pop("X.weight")
    return codes, {name.removeprefix("X.weight."): tensor for name, tensor in tensors.items()}


def state_tensor(text):
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def with_state(companions, **changes):
    state = json.loads(companions[STATE].numpy().tobytes())
    state.update(changes)
    return companions | {STATE: state_tensor(json.dumps(state))}


OPTIONS = [
    {},
    {"nested": True},
    {"block_size": 128},
    {"block_size": 128, "nested": True},
    {"quant_type": "fp4"},
    {"quant_type": "fp4", "nested": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_weight_survives_the_disk_bit_for_bit(options):
    weight = make(**options)
    codes, companions = on_disk(**options)
    found = weight_from_tensors("X.weight", codes, companions)
    assert torch.equal(reference.dequantize(found), reference.dequantize(weight))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_form_of_a_weight_survives_the_disk(options):
    weight = make(**options)
    found = weight_from_tensors("X.weight", *on_disk(**options))
    for field in ("shape", "block_size", "quant_type", "dtype", "is_nested"):
        assert getattr(found, field) == getattr(weight, field)


def test_reading_copies_neither_codes_nor_absmax():
    codes, companions = on_disk()
    weight = weight_from_tensors("X.weight", codes, companions)
    assert weight.codes.data_ptr() == codes.data_ptr()
    assert weight.absmax.data_ptr() == companions["absmax"].data_ptr()


def test_the_state_of_v2_reads_as_bitsandbytes_writes_it():
    text = b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 128]}'
    assert state_bytes(make()) == text


def test_the_state_of_v1_names_its_nesting_last():
    state = json.loads(state_bytes(make(nested=True)))
    assert list(state)[4:] == ["nested_blocksize", "nested_dtype", "nested_offset"]


def test_packed_codes_are_a_column():
    assert on_disk()[0].shape == (512, 1)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("a.weight.absmax", ("a.weight", "absmax")),
        ("a.weight.nested_absmax", ("a.weight", "nested_absmax")),
        ("a.weight.quant_map", ("a.weight", "quant_map")),
        ("a.weight.nested_quant_map", ("a.weight", "nested_quant_map")),
        (f"a.weight.{STATE}", ("a.weight", STATE)),
        ("a.weight", None),
        ("a.bias.absmax", None),
        ("a.weight.quant_state.bitsandbytes__int8", None),
    ],
)
def test_companions_are_told_by_their_suffix(name, split):
    assert split_companion(name) == split


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_type": "fp4"}, "wrong quant_type 'fp4'"),
        ({"quant_type": "nf5"}, "wrong quant_type 'nf5'"),
        ({"quant_type": None}, "wrong quant_type None"),
        ({"blocksize": 32}, "wrong blocksize 32"),
        ({"blocksize": 64.0}, "wrong blocksize 64.0"),
        ({"blocksize": True}, "wrong blocksize True"),
        ({"blocksize": 128}, "absmax` must be"),
        ({"dtype": "int8"}, "wrong dtype 'int8'"),
        ({"dtype": "__class__"}, "wrong dtype"),
        ({"dtype": ["bfloat16"]}, "wrong dtype"),
        ({"shape": [8, 64]}, "must be torch.uint8"),
        ({"shape": [1024]}, "wrong shape"),
        ({"shape": [8, 128, 1]}, "wrong shape"),
        ({"shape": [-8, -128]}, "wrong shape"),
        ({"shape": [8.0, 128]}, "wrong shape"),
        ({"shape": [True, 1024]}, "wrong shape"),
        ({"shape": [0, 128]}, "wrong shape"),
        ({"shape": [2**40, 2**40]}, "wrong shape"),
        ({"shape": [3, 5]}, "does not fill blocks of 64"),
        ({"shape": "8,128"}, "wrong shape"),
        ({"unknown": 1}, "must hold quant_type"),
        ({"nested_blocksize": 256}, "must hold quant_type"),
    ],
    ids=str,
)
def test_a_state_that_lies_is_refused(changes, message):
    codes, companions = on_disk()
    with pytest.raises(FormatError, match=message):
        weight_from_tensors("X.weight", codes, with_state(companions, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"nested_blocksize": 128},
        {"nested_blocksize": 256.0},
        {"nested_dtype": "float16"},
        {"nested_offset": "0"},
        {"nested_offset": None},
        {"nested_offset": True},
        {"nested_offset": 1e300},
    ],
    ids=str,
)
def test_a_nested_state_that_lies_is_refused(changes):
    codes, companions = on_disk(nested=True)
    with pytest.raises(FormatError, match="wrong nested_"):
        weight_from_tensors("X.weight", codes, with_state(companions, **changes))


@pytest.mark.parametrize("text", [" ", "[]", "null", "{", '{"quant_type": "nf4"}', "NaN", "1"])
def test_a_state_that_is_no_object_is_refused(text):
    codes, companions = on_disk()
    with pytest.raises(FormatError, match="bitsandbytes__nf4"):
        weight_from_tensors("X.weight", codes, companions | {STATE: state_tensor(text)})


def test_a_state_with_a_doubled_key_is_refused():
    codes, companions = on_disk()
    text = companions[STATE].numpy().tobytes().decode()
    doubled = state_tensor(text[:-1] + ', "shape": [8, 128]}')
    with pytest.raises(FormatError, match="'shape' twice"):
        weight_from_tensors("X.weight", codes, companions | {STATE: doubled})


def test_a_huge_state_is_not_parsed():
    codes, companions = on_disk()
    with pytest.raises(FormatError, match="at most 4096"):
        weight_from_tensors("X.weight", codes, companions | {STATE: state_tensor(" " * 5000)})


@pytest.mark.parametrize("options", [{}, {"nested": True}], ids=["v2", "v1"])
def test_each_companion_is_needed(options):
    codes, companions = on_disk(**options)
    for suffix in companions:
        fewer = {key: value for key, value in companions.items() if key != suffix}
        with pytest.raises(FormatError, match=r"X\.weight"):
            weight_from_tensors("X.weight", codes, fewer)


def test_a_companion_too_many_is_refused():
    codes, companions = on_disk()
    _, nested = on_disk(nested=True)
    more = companions | {"nested_absmax": nested["nested_absmax"]}
    with pytest.raises(FormatError, match="must have the companions"):
        weight_from_tensors("X.weight", codes, more)


def test_two_states_are_refused():
    codes, companions = on_disk()
    both = companions | {"quant_state.bitsandbytes__fp4": companions[STATE]}
    with pytest.raises(FormatError, match="exactly one"):
        weight_from_tensors("X.weight", codes, both)


@pytest.mark.parametrize("level", [0.5, float("nan"), float("inf")])
def test_another_table_is_refused(level):
    codes, companions = on_disk()
    table = companions["quant_map"].clone()
    table[3] = level
    with pytest.raises(FormatError, match="not the table of its kind"):
        weight_from_tensors("X.weight", codes, companions | {"quant_map": table})


def test_a_nested_table_with_nan_is_refused():
    codes, companions = on_disk(nested=True)
    table = companions["nested_quant_map"].clone()
    table[3] = float("nan")
    with pytest.raises(FormatError, match="NaN or infinity"):
        weight_from_tensors("X.weight", codes, companions | {"nested_quant_map": table})


@pytest.mark.parametrize("options", [{}, {"nested": True}], ids=["v2", "v1"])
def test_a_companion_of_the_wrong_length_is_refused(options):
    codes, companions = on_disk(**options)
    for suffix, tensor in companions.items():
        if suffix == STATE:
            continue
        with pytest.raises(FormatError, match=f"{suffix}` must be"):
            weight_from_tensors("X.weight", codes, companions | {suffix: tensor[:-1]})


def test_codes_in_a_row_are_refused():
    codes, companions = on_disk()
    with pytest.raises(FormatError, match=r"must be torch.uint8 \[512, 1\]"):
        weight_from_tensors("X.weight", codes.view(1, -1), companions)


def test_absmax_may_sum_to_more_than_float32_holds():
    check_is_finite("X.weight", torch.full((4,), 3e38))


@pytest.mark.parametrize("nested", [False, True])
def test_a_good_absmax_is_finite(nested):
    weight = make(nested=nested)
    check_absmax_is_finite("X.weight", weight)
    assert torch.isfinite(weight.float_absmax()).all()


@pytest.mark.parametrize("nested", [False, True])
def test_an_absmax_with_nan_is_refused(nested):
    weight = make(nested=nested)
    values = weight.absmax.absmax if nested else weight.absmax
    values[0] = float("nan")
    with pytest.raises(FormatError, match="holds NaN or infinity"):
        check_absmax_is_finite("X.weight", weight)


def test_another_nested_block_size_cannot_be_written():
    weight = make(nested=True)
    absmax = weight.absmax
    other = dataclasses.replace(
        absmax, block_size=128, absmax=absmax.absmax.repeat(-(-absmax.codes.numel() // 128))
    )
    with pytest.raises(InputError, match="nested blocks must be 256"):
        tensors_from_weight("X.weight", dataclasses.replace(weight, absmax=other))
