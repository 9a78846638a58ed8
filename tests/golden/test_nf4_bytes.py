"""The bytes of one small weight, written out: whoever changes the format sees it here.

The weight needs no random numbers: 2 x 64 values, ((37 * i) % 101 - 50) / 64, the second row a
quarter of that. bitsandbytes 0.50.2 gives the same bytes (tests/parity).
"""

import torch

from flux_nf4.nf4 import reference
from flux_nf4.nf4.codec import NestedAbsmax

CODES_NF4 = (
    "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c1"
    "6d18e3b04c17e29f3b05d17e2af4c06d18e2a04c16e29f3b05d17e29f3c05d18"
)
CODES_FP4 = (
    "bf5a92a63c4be5a02d63c4be2a12d73f5a92a63d4bf5a92d63c4be5a12d73c5b"
    "e2a63d4bf5a92d63c4be5a12d73c5be2a12d7bf5a92a63c4be5a02d63c4be2a1"
)
ABSMAX = "0000483f0000483e"
NESTED_CODES = "ff00"
NESTED_ABSMAX = "0000963e"
NESTED_OFFSET = "0000fa3e"
BF16_FIRST_EIGHT = "92bce13d0bbe7f3c113e9ebd873d48be"


def fixed_weight() -> torch.Tensor:
    i = torch.arange(128)
    w_NK = ((37 * i) % 101 - 50).float().view(2, 64) / 64
    w_NK[1] /= 4
    return w_NK


def as_hex(tensor: torch.Tensor) -> str:
    return bytes(tensor.contiguous().view(torch.uint8).tolist()).hex()


def test_nf4_codes() -> None:
    assert as_hex(reference.quantize(fixed_weight()).codes) == CODES_NF4


def test_fp4_codes() -> None:
    assert as_hex(reference.quantize(fixed_weight(), quant_type="fp4").codes) == CODES_FP4


def test_absmax() -> None:
    assert as_hex(reference.quantize(fixed_weight()).float_absmax()) == ABSMAX


def test_nested_statistics() -> None:
    nested = reference.quantize(fixed_weight(), nested=True).absmax
    assert isinstance(nested, NestedAbsmax)
    assert as_hex(nested.codes) == NESTED_CODES
    assert as_hex(nested.absmax) == NESTED_ABSMAX
    assert as_hex(torch.tensor([nested.offset])) == NESTED_OFFSET


def test_decoded_bfloat16() -> None:
    decoded = reference.dequantize(reference.quantize(fixed_weight()), torch.bfloat16)
    assert as_hex(decoded[1, :8]) == BF16_FIRST_EIGHT
