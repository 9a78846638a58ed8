from pathlib import Path

import pytest
import torch

from flux_nf4.errors import FormatError, InputError
from flux_nf4.formats.component import Component
from flux_nf4.nf4 import reference
from flux_nf4.nf4.codec import NF4Weight
from flux_nf4.pipeline.convert import QuantizationWish, is_linear_weight, quantize_component

V2 = QuantizationWish(quant_type="nf4", double_quant=False)


def component(**entries):
    base = {
        "img_in.weight": torch.randn(128, 64, dtype=torch.bfloat16),
        "img_in.bias": torch.randn(128),
        "double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(64),
    }
    named = {name.replace("__", "."): entry for name, entry in entries.items()}
    return Component(kind="transformer", entries=base | named, source=Path("somewhere"))


def test_every_matrix_is_quantised_and_nothing_else():
    done = quantize_component(component(txt_in__weight=torch.randn(128, 128)), V2)
    quantised = [name for name, entry in done.entries.items() if isinstance(entry, NF4Weight)]
    assert quantised == ["img_in.weight", "txt_in.weight"]


def test_the_codes_are_those_of_the_codec():
    before = component()
    weight = quantize_component(before, V2).entries["img_in.weight"]
    expected = reference.quantize(before.entries["img_in.weight"])
    assert torch.equal(weight.codes, expected.codes)
    assert torch.equal(weight.absmax, expected.absmax)


def test_a_wish_for_double_quantisation_nests_absmax():
    wish = QuantizationWish(double_quant=True)
    assert quantize_component(component(), wish).entries["img_in.weight"].is_nested


def test_a_wish_for_fp4_gives_fp4():
    done = quantize_component(component(), QuantizationWish(quant_type="fp4"))
    assert done.entries["img_in.weight"].quant_type == "fp4"


def test_an_eight_bit_matrix_is_widened_first():
    stored = torch.randn(128, 64).to(torch.float8_e4m3fn)
    done = quantize_component(component(img_in__weight=stored), V2)
    assert done.entries["img_in.weight"].dtype == torch.bfloat16


def test_a_weight_that_meets_the_wish_stays_the_very_same():
    weight = reference.quantize(torch.randn(128, 64))
    done = quantize_component(component(img_in__weight=weight), V2)
    assert done.entries["img_in.weight"] is weight


def test_an_open_wish_takes_any_quantised_weight():
    weight = reference.quantize(torch.randn(128, 64), nested=True, quant_type="fp4")
    done = quantize_component(component(img_in__weight=weight), QuantizationWish())
    assert done.entries["img_in.weight"] is weight


@pytest.mark.parametrize(
    ("nested", "wish", "reason"),
    [
        (True, V2, r"doubly quantised \(v1\), and `bnb_4bit_use_double_quant` is False"),
        (False, QuantizationWish(double_quant=True), r"not doubly quantised \(v2\)"),
        (False, QuantizationWish(quant_type="fp4"), "nf4, and `bnb_4bit_quant_type` asks for fp4"),
    ],
)
def test_a_disagreement_says_how_to_convert(nested, wish, reason):
    weight = reference.quantize(torch.randn(128, 64), nested=nested)
    with pytest.raises(InputError, match=reason) as caught:
        quantize_component(component(img_in__weight=weight), wish)
    assert "flux-nf4 convert" in caught.value.hint


def test_a_weight_with_nan_is_named():
    weight = torch.full((128, 64), torch.nan)
    with pytest.raises(FormatError, match=r"`img_in\.weight` holds NaN"):
        quantize_component(component(img_in__weight=weight), V2)


def test_an_unknown_type_cannot_be_wished_for():
    with pytest.raises(InputError, match="nf5"):
        QuantizationWish(quant_type="nf5")


def test_vectors_are_not_linear_weights():
    assert not is_linear_weight("norm.scale", torch.ones(64))
    assert not is_linear_weight("img_in.bias", torch.ones(64))
