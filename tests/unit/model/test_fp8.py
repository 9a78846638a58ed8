"""Layers that keep their weight in 8 bits compute with exactly the values they hold."""

import pytest
import torch
import torch.nn.functional as F

from flux_nf4.model.fp8 import FP8_DTYPES, Fp8Embedding, Fp8Linear


def stored(rows: int, columns: int, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator).to(dtype)


@pytest.mark.parametrize("stored_dtype", FP8_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_equals_a_linear_on_the_widened_weight(stored_dtype, dtype):
    weight, x = stored(5, 7, stored_dtype), torch.randn(2, 3, 7, dtype=dtype)
    bias = torch.randn(5, dtype=dtype)
    expected = F.linear(x, weight.to(dtype), bias)
    assert torch.equal(Fp8Linear(weight, bias)(x), expected)


def test_linear_passes_gradients_to_its_input():
    weight, x = stored(5, 7), torch.randn(3, 7, requires_grad=True)
    Fp8Linear(weight)(x).sum().backward()
    assert torch.equal(x.grad, weight.float().sum(dim=0).expand(3, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embedding_gives_rows_in_the_dtype_that_it_was_told(dtype):
    table, ids = stored(9, 4), torch.tensor([[8, 0, 3], [3, 3, 1]])
    found = Fp8Embedding(table, dtype)(ids)
    assert (found.dtype, torch.equal(found, table.to(dtype)[ids])) == (dtype, True)


def test_widening_and_narrowing_again_changes_no_value():
    finite = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = finite[finite.float().isfinite()]
    assert torch.equal(
        finite.to(torch.bfloat16).to(torch.float8_e4m3fn).view(torch.uint8),
        finite.view(torch.uint8),
    )
