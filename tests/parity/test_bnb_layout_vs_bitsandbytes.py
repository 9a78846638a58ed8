"""The tensors that travel with a weight are, byte for byte, bitsandbytes' own."""

import pytest
import torch

from flux_nf4.formats.bnb import tensors_from_weight, weight_from_tensors
from flux_nf4.nf4 import reference

CASES = [
    pytest.param(
        {"quant_type": quant_type, "nested": nested, "block_size": block_size},
        id=f"{quant_type}-{'v1' if nested else 'v2'}-{block_size}",
    )
    for quant_type in ("nf4", "fp4")
    for nested in (False, True)
    for block_size in (64, 128)
]


@pytest.fixture(scope="module")
def functional():
    from bitsandbytes import functional

    return functional


@pytest.fixture(scope="module")
def values():
    return torch.randn(48, 384, generator=torch.Generator().manual_seed(3)).bfloat16()


def theirs(functional, values, options):
    """The tensors that bitsandbytes would save for a weight called X.weight."""
    codes, state = functional.quantize_4bit(
        values,
        blocksize=options["block_size"],
        compress_statistics=options["nested"],
        quant_type=options["quant_type"],
    )
    packed = state.as_dict(packed=True)
    return {"X.weight": codes, **{f"X.weight.{key}": tensor for key, tensor in packed.items()}}


def same_bits(left, right):
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.flatten().view(torch.uint8), right.flatten().view(torch.uint8))
    )


@pytest.mark.parametrize("options", CASES)
def test_the_tensors_of_a_weight_are_those_of_bitsandbytes(functional, values, options):
    ours = tensors_from_weight("X.weight", reference.quantize(values, **options))
    expected = theirs(functional, values, options)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(ours[name], tensor), name


@pytest.mark.parametrize("options", CASES)
def test_what_bitsandbytes_wrote_survives_reading_and_writing(functional, values, options):
    expected = theirs(functional, values, options)
    companions = {
        name.removeprefix("X.weight."): tensor
        for name, tensor in expected.items()
        if name != "X.weight"
    }
    weight = weight_from_tensors("X.weight", expected["X.weight"], companions)
    ours = tensors_from_weight("X.weight", weight)
    assert all(same_bits(ours[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_json_text_is_that_of_bitsandbytes_for_every_dtype(functional, values, dtype):
    key = "X.weight.quant_state.bitsandbytes__nf4"
    options = {"quant_type": "nf4", "nested": True, "block_size": 64}
    ours = tensors_from_weight("X.weight", reference.quantize(values.to(dtype), nested=True))[key]
    expected = theirs(functional, values.to(dtype), options)[key]
    assert ours.numpy().tobytes() == expected.numpy().tobytes()


@pytest.mark.parametrize("options", CASES)
def test_bitsandbytes_decodes_what_we_write(functional, values, options):
    weight = reference.quantize(values, **options)
    tensors = tensors_from_weight("X.weight", weight)
    codes = tensors.pop("X.weight")
    state = functional.QuantState.from_dict(
        {name.removeprefix("X.weight."): tensor for name, tensor in tensors.items()},
        device=torch.device("cpu"),
    )
    decoded = functional.dequantize_4bit(codes, state)
    assert torch.equal(decoded, reference.dequantize(weight))
