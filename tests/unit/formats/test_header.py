import json

import pytest
import torch

from flux_nf4.errors import FormatError
from flux_nf4.formats.dtypes import DTYPES
from flux_nf4.formats.header import (
    MAX_NUM_TENSORS,
    encode_header,
    parse_header,
    plan_header,
)


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def parse(**entries):
    return parse_header(json.dumps(entries).encode())


def test_a_good_header_is_parsed():
    info = parse(a=entry()).infos["a"]
    assert (info.dtype, info.shape, info.start, info.stop) == (torch.float32, (2,), 0, 8)


def test_infos_come_in_the_order_of_the_data():
    header = parse(b=entry(offsets=(8, 16)), a=entry())
    assert list(header.infos) == ["a", "b"]


def test_metadata_is_read():
    assert parse(__metadata__={"format": "pt"}, a=entry()).metadata == {"format": "pt"}


def test_empty_tensors_may_share_an_offset():
    assert (
        len(parse(a=entry(shape=[0], offsets=[0, 0]), b=entry(shape=[0], offsets=[0, 0])).infos)
        == 2
    )


def test_a_scalar_has_one_value():
    assert parse(a=entry(shape=[], offsets=[0, 4])).infos["a"].shape == ()


@pytest.mark.parametrize(
    "bad",
    [
        entry(dtype="F33"),
        entry(dtype=None),
        entry(dtype=["F32"]),
        entry(shape=[-2]),
        entry(shape=[2.0]),
        entry(shape=[True, 2]),
        entry(shape=["2"]),
        entry(shape=[3]),
        entry(shape=[2**62, 2**62]),
        entry(shape=[0, 2**62, 2**62], offsets=[0, 0]),
        entry(shape=[0, 2**100], offsets=[0, 0]),
        entry(shape=[1] * 9 + [2]),
        entry(offsets=[-8, 0]),
        entry(offsets=[8, 0]),
        entry(offsets=[0.0, 8.0]),
        entry(offsets=[False, 8]),
        entry(offsets=[0, 8, 8]),
        entry(offsets=[0, 10**400]),
        entry(extra=1),
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        [],
        None,
    ],
    ids=repr,
)
def test_a_bad_entry_is_refused(bad):
    with pytest.raises(FormatError, match="tensor `a`"):
        parse(a=bad)


def test_an_overlap_is_refused():
    with pytest.raises(FormatError, match="overlaps"):
        parse(a=entry(), b=entry(offsets=[4, 12]))


@pytest.mark.parametrize("start", [4, 2**60])
def test_a_hole_is_refused(start):
    with pytest.raises(FormatError, match="leaves a hole"):
        parse(a=entry(offsets=[start, start + 8]))


@pytest.mark.parametrize(
    "name", ["", "a\0b", "a\nb", "/etc/passwd", "../a", "a/../b", "a\\b", "\ud800", "n" * 600]
)
def test_a_name_that_is_a_path_or_hides_characters_is_refused(name):
    with pytest.raises(FormatError, match="no name for a tensor"):
        parse(**{name: entry()})


@pytest.mark.parametrize("metadata", [{"a": 1}, {"a": None}, [], "a", None, {"a": {"b": "c"}}])
def test_metadata_that_is_not_strings_is_refused(metadata):
    with pytest.raises(FormatError, match="strings only"):
        parse(__metadata__=metadata)


def test_metadata_with_half_a_surrogate_pair_is_refused():
    with pytest.raises(FormatError, match="not Unicode"):
        parse(__metadata__={"a": "\ud800"})


@pytest.mark.parametrize("data", [b"", b" {}", b"[]", b"null", b'{"a":1}{}'])
def test_anything_but_one_object_is_refused(data):
    with pytest.raises(FormatError):
        parse_header(data)


def test_a_doubled_name_is_refused():
    text = json.dumps(entry(shape=[0], offsets=[0, 0]))
    with pytest.raises(FormatError, match="'a' twice"):
        parse_header(f'{{"a": {text}, "a": {text}}}'.encode())


def test_too_many_tensors_are_refused():
    empty = entry(shape=[0], offsets=[0, 0])
    with pytest.raises(FormatError, match="at most"):
        parse(**{f"t{i}": empty for i in range(MAX_NUM_TENSORS + 1)})


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_survives_writing_and_parsing(dtype):
    planned = plan_header([("a", dtype, (3, 5))], {"k": "v"})
    assert parse_header(encode_header(planned)[8:]) == planned


def test_a_header_is_padded_to_eight_bytes():
    planned = [plan_header([("a" * n, torch.uint8, (1,))]) for n in range(1, 9)]
    assert all(len(encode_header(header)) % 8 == 0 for header in planned)


def test_a_dtype_that_the_format_lacks_is_refused():
    with pytest.raises(FormatError, match="complex128"):
        plan_header([("a", torch.complex128, (1,))])


def test_a_tensor_may_not_take_the_name_of_the_metadata():
    with pytest.raises(FormatError, match="__metadata__"):
        plan_header([("__metadata__", torch.uint8, (1,))])
