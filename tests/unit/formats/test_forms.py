import pytest
import torch

from flux_nf4.formats.forms import can_join_nested, cut_rows, is_exact, join_rows, reform
from flux_nf4.nf4 import reference
from flux_nf4.nf4.codec import NestedAbsmax


def nested_weight(num_out=512, num_in=128, *, seed=0):
    """512 x 128 has 1024 blocks: four of 256."""
    torch.manual_seed(seed)
    return reference.quantize(torch.randn(num_out, num_in), nested=True)


def stored_tensors(weight):
    assert isinstance(weight.absmax, NestedAbsmax)
    return (weight.codes, *weight.absmax.tensors())


def test_nested_statistics_stay_nested_where_rows_own_whole_blocks_of_them():
    whole = nested_weight()
    cut = cut_rows(whole, 128, 384)

    assert cut.is_nested
    assert torch.equal(reference.dequantize(cut), reference.dequantize(whole)[128:384])


def test_a_cut_within_a_nested_block_un_nests_and_keeps_every_value():
    whole = nested_weight()
    cut = cut_rows(whole, 64, 300)

    assert not cut.is_nested
    assert torch.equal(reference.dequantize(cut), reference.dequantize(whole)[64:300])


def test_the_last_rows_may_end_within_a_nested_block():
    whole = nested_weight(500)

    assert cut_rows(whole, 256, 500).is_nested


def test_pieces_of_one_nested_weight_join_to_the_same_bytes():
    whole = nested_weight(500)
    pieces = (cut_rows(whole, 0, 128), cut_rows(whole, 128, 256), cut_rows(whole, 256, 500))

    joined = join_rows(pieces)
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(stored_tensors(joined), stored_tensors(whole), strict=True)
    )


def test_nested_weights_of_different_offsets_are_un_nested_to_be_joined():
    parts = nested_weight(seed=1), nested_weight(seed=2)
    joined = join_rows(parts)

    assert not can_join_nested(parts)
    assert torch.equal(
        reference.dequantize(joined), torch.cat([reference.dequantize(part) for part in parts])
    )


def test_a_piece_that_ends_within_a_nested_block_cannot_be_followed_by_another():
    whole = nested_weight(500)
    last = cut_rows(whole, 256, 500)

    assert not can_join_nested((last, cut_rows(whole, 0, 256)))


@pytest.mark.parametrize("form", ["keep", "v2", "bf16"])
def test_the_outline_of_a_form_has_the_shape_of_its_values(form):
    weight = nested_weight()
    outlined, values = reform(weight.to("meta"), form), reform(weight, form)

    assert (type(outlined), tuple(outlined.shape)) == (type(values), tuple(values.shape))


@pytest.mark.parametrize(
    ("value", "dtype", "exact"),
    [
        (1.5, torch.float8_e4m3fn, True),
        (449.0, torch.float8_e4m3fn, False),
        (1.001, torch.bfloat16, False),
        (float("nan"), torch.bfloat16, False),
        (-0.0, torch.float16, True),
    ],
)
def test_exact_is_what_comes_back_unchanged(value, dtype, exact):
    assert is_exact(torch.tensor([value]), dtype) is exact
