from pathlib import Path

import pytest
import torch

from flux_nf4.errors import FormatError
from flux_nf4.formats.component import Component, Entries, Stored, entry_bytes, outline, stored_as
from flux_nf4.nf4 import reference


def matrix(rows, columns=128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).bfloat16()


def test_plain_parts_are_joined_along_their_rows():
    parts = (matrix(2), matrix(3, seed=1), matrix(1, seed=2))
    assert torch.equal(Entries({"a": parts})["a"], torch.cat(parts))


@pytest.mark.parametrize("nested", [False, True])
def test_quantised_parts_are_joined_exactly(nested):
    parts = tuple(reference.quantize(matrix(4, seed=seed), nested=nested) for seed in range(3))
    joined = reference.dequantize(Entries({"a": parts})["a"])
    assert torch.equal(joined, torch.cat([reference.dequantize(part) for part in parts]))


def test_a_single_part_is_given_as_it_is():
    weight = reference.quantize(matrix(4), nested=True)
    assert Entries({"a": (weight,)})["a"] is weight


@pytest.mark.parametrize("quantise", [False, True])
def test_swapped_halves_change_places_exactly(quantise):
    whole = matrix(4)
    entry = reference.quantize(whole) if quantise else whole
    values = reference.dequantize(entry) if quantise else whole
    found = Entries({"a": (entry,)}, frozenset({"a"}))["a"]
    found = reference.dequantize(found) if quantise else found
    assert torch.equal(found, torch.cat((values[2:], values[:2])))


def test_a_bias_is_joined_and_swapped_too():
    bias = torch.arange(4.0)
    assert Entries({"a": (bias,)}, frozenset({"a"}))["a"].tolist() == [2, 3, 0, 1]


@pytest.mark.parametrize(
    "parts",
    [
        (matrix(2), matrix(2, 64)),
        (matrix(2), matrix(2).float()),
        (matrix(2), matrix(2)[0]),
        (matrix(2), reference.quantize(matrix(2))),
        (reference.quantize(matrix(2)), reference.quantize(matrix(2), quant_type="fp4")),
        (reference.quantize(matrix(2)), reference.quantize(matrix(2), block_size=128)),
        (reference.quantize(matrix(2)), reference.quantize(matrix(2, 256))),
        (torch.tensor(1.0), torch.tensor(1.0)),
    ],
    ids=["width", "dtype", "axes", "plain+nf4", "nf4+fp4", "blocks", "nf4-width", "scalars"],
)
def test_parts_that_do_not_fit_are_refused(parts):
    with pytest.raises(FormatError, match="the parts of `a` do not fit each other"):
        Entries({"a": parts})


@pytest.mark.parametrize("entry", [matrix(3), reference.quantize(matrix(2, 96), block_size=64)])
def test_an_entry_without_two_halves_is_refused(entry):
    with pytest.raises(FormatError, match="has no two halves"):
        Entries({"a": (entry,)}, frozenset({"a"}))


def test_an_outline_has_the_joined_shape_and_no_values():
    parts = tuple(reference.quantize(matrix(4), nested=True) for _ in range(3))
    found = outline(Entries({"a": parts}), "a")
    assert (found.shape, found.device.type) == ((12, 128), "meta")


def test_an_outline_of_a_plain_mapping_has_no_values():
    found = outline({"a": matrix(3)}, "a")
    assert (tuple(found.shape), found.device.type) == ((3, 128), "meta")


@pytest.mark.parametrize(
    ("entry", "label"),
    [
        (torch.zeros(1), "fp32"),
        (torch.zeros(1).bfloat16(), "bf16"),
        (torch.zeros(1).half(), "fp16"),
        (torch.zeros(1).to(torch.float8_e4m3fn), "fp8"),
        (torch.zeros(1).to(torch.float8_e5m2), "fp8 e5m2"),
        (torch.zeros(1, dtype=torch.int8), "int8"),
        (reference.quantize(matrix(2)), "nf4 v2"),
        (reference.quantize(matrix(2), nested=True), "nf4 v1"),
        (reference.quantize(matrix(2), quant_type="fp4"), "fp4"),
    ],
)
def test_storage_is_called_what_people_call_it(entry, label):
    assert stored_as(entry) == label


def test_a_quantised_entry_counts_its_statistics():
    assert entry_bytes(reference.quantize(matrix(2))) == 2 * 128 // 2 + 4 * 4


def component(**entries):
    return Component(kind="transformer", entries=entries, source=Path("x"))


def test_a_summary_counts_tensors_and_bytes_the_most_bytes_first():
    found = component(a=torch.zeros(2), b=matrix(2), c=matrix(1)).summary()
    assert list(found.items()) == [
        ("bf16", Stored(num_tensors=2, num_bytes=3 * 128 * 2)),
        ("fp32", Stored(num_tensors=1, num_bytes=8)),
    ]


def test_a_summary_of_matrices_leaves_vectors_out():
    found = component(a=torch.zeros(2), b=matrix(2)).summary(matrices_only=True)
    assert list(found) == ["bf16"]


def test_num_bytes_adds_up():
    assert component(a=torch.zeros(2), b=matrix(2)).num_bytes == 8 + 2 * 128 * 2
