"""The operators as PyTorch sees them: schema, fake kernels, compilation, and the one choice."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from flux_nf4.errors import InputError, ShapeError
from flux_nf4.nf4 import codec, ops, reference
from flux_nf4.nf4.codec import NestedAbsmax, NF4Weight

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random_weight(*, nested: bool = False, quant_type: codec.QuantType = "nf4") -> NF4Weight:
    w_NK = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    return ops.quantize(w_NK, nested=nested, quant_type=quant_type)


def arguments(weight: NF4Weight, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    layout = (weight.shape, weight.block_size, weight.quant_type, dtype)
    if isinstance(weight.absmax, NestedAbsmax):
        return weight.codes, list(weight.absmax.tensors()), weight.absmax.block_size, *layout
    return weight.codes, weight.absmax, *layout


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, None])
def test_dequantize_equals_the_reference(nested: bool, dtype: torch.dtype | None) -> None:
    weight = random_weight(nested=nested)
    assert torch.equal(ops.dequantize(weight, dtype), reference.dequantize(weight, dtype))


def test_quantize_equals_the_reference() -> None:
    w_NK = torch.linspace(-1, 1, 128)[None]
    assert torch.equal(ops.quantize(w_NK).codes, reference.quantize(w_NK).codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_opcheck_passes(dtype: torch.dtype, quant_type: codec.QuantType) -> None:
    weight = random_weight(quant_type=quant_type)
    results = torch.library.opcheck(
        torch.ops.flux_nf4.dequantize_4bit.default, arguments(weight, dtype)
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_passes_for_nested(dtype: torch.dtype) -> None:
    weight = random_weight(nested=True)
    results = torch.library.opcheck(
        torch.ops.flux_nf4.dequantize_4bit_nested.default, arguments(weight, dtype)
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("nested", [False, True])
def test_dequantize_compiles_without_a_graph_break(nested: bool) -> None:
    weight = random_weight(nested=nested)
    operator = ops.dequantize_4bit_nested if nested else ops.dequantize_4bit

    def doubled(*values: Any) -> torch.Tensor:
        return operator(*values) * 2

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    expected = reference.dequantize(weight, torch.bfloat16) * 2
    assert torch.equal(compiled(*arguments(weight)), expected)


@pytest.mark.parametrize("nested", [False, True])
def test_fake_kernel_gives_shape_and_dtype(nested: bool) -> None:
    out = ops.dequantize(random_weight(nested=nested).to("meta"), torch.float16)
    assert (tuple(out.shape), out.dtype, out.device.type) == ((6, 128), torch.float16, "meta")


def test_cuda_without_triton_falls_back_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)
    assert ops._implementation.__wrapped__("cuda") is reference


def test_cuda_with_triton_uses_the_kernels() -> None:
    assert ops._implementation.__wrapped__("cuda").__name__ == "flux_nf4.nf4.triton_kernels"


def test_neither_triton_nor_the_compiler_is_imported_without_need() -> None:
    script = (
        "import sys, torch\n"
        "from flux_nf4.nf4 import linear, ops\n"
        "ops.dequantize(ops.quantize(torch.ones(1, 64)))\n"
        "sys.exit(str({'triton', 'torch._dynamo'} & set(sys.modules) or ''))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert run.stderr.strip() == ""


def replaced(values: tuple[Any, ...], index: int, value: object) -> tuple[Any, ...]:
    return *values[:index], value, *values[index + 1 :]


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(10, dtype=torch.uint8), "10 bytes and 12 blocks of 64 do not make"),
        (1, torch.zeros(11), "384 bytes and 11 blocks of 64 do not make"),
        (2, (6, 64), "do not make a weight of 6 x 64"),
        (2, (768,), "two dimensions, got 1"),
    ],
)
def test_operator_refuses_what_does_not_fit(index: int, value: object, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        ops.dequantize_4bit(*replaced(arguments(random_weight()), index, value))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(384), r"codes must be torch\.uint8, got torch\.float32"),
        (0, torch.zeros(768, dtype=torch.uint8)[::2], "must be contiguous"),
        (1, torch.zeros(12, dtype=torch.float16), r"absmax must be torch\.float32"),
        (3, 65, "block_size must be 64 or 128, got 65"),
        (4, "int4", "`nf4` or `fp4`"),
        (5, torch.int8, r"not torch\.int8"),
    ],
)
def test_operator_refuses_what_it_does_not_know(index: int, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.dequantize_4bit(*replaced(arguments(random_weight()), index, value))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(12), r"nested codes must be torch\.uint8"),
        (1, torch.zeros(2), "need 1 absmax, 256 levels and 1 offset, got 2, 256 and 1"),
        (1, torch.zeros(1, dtype=torch.float64), r"nested absmax must be torch\.float32"),
        (2, torch.zeros(16), "got 1, 16 and 1"),
        (2, torch.zeros(512)[::2], "must be contiguous"),
        (3, torch.zeros(2), "got 1, 256 and 2"),
    ],
)
def test_nested_operator_refuses_what_does_not_fit(index: int, value: object, message: str) -> None:
    values = arguments(random_weight(nested=True))
    nested = list(replaced(tuple(values[1]), index, value))
    with pytest.raises(InputError, match=message):
        ops.dequantize_4bit_nested(*replaced(values, 1, nested))


def test_nested_operator_refuses_three_tensors() -> None:
    values = arguments(random_weight(nested=True))
    with pytest.raises(InputError, match="got 3 tensors in blocks of 256"):
        ops.dequantize_4bit_nested(*replaced(values, 1, values[1][:3]))
