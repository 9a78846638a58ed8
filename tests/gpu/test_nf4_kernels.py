"""The kernels on a real GPU, bit for bit the reference on the CPU."""

import pytest
import torch
from torch.nn import functional

from flux_nf4.nf4 import ops, reference
from flux_nf4.nf4.codec import NF4Weight, QuantType
from flux_nf4.nf4.linear import NF4Linear

pytestmark = pytest.mark.gpu

SHAPES = [(1, 64), (1, 128), (3, 64), (33, 64), (31, 192), (65, 128), (4, 32), (3072, 3072)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def random_weight(
    shape: tuple[int, int], block_size: int = 64, quant_type: QuantType = "nf4", *, nested: bool
) -> NF4Weight:
    w_NK = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).bfloat16()
    return reference.quantize(w_NK, block_size=block_size, quant_type=quant_type, nested=nested)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_expansion_equals_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, quant_type: QuantType, nested: bool
) -> None:
    for block_size in (64, 128):
        if shape[0] * shape[1] % block_size == 0:
            weight = random_weight(shape, block_size, quant_type, nested=nested)
            on_gpu = ops.dequantize(weight.to("cuda"), dtype).cpu()
            assert torch.equal(on_gpu, reference.dequantize(weight, dtype))


@pytest.mark.parametrize("nested", [False, True])
def test_reference_on_the_gpu_equals_the_reference_on_the_cpu(nested: bool) -> None:
    weight = random_weight((33, 192), nested=nested)
    assert torch.equal(reference.dequantize(weight.to("cuda")).cpu(), reference.dequantize(weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantising_on_the_gpu_gives_the_bytes_of_the_cpu(dtype: torch.dtype) -> None:
    w_NK = torch.randn(300, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    w_NK[7] = 0
    on_gpu, on_cpu = ops.quantize(w_NK.cuda()).to("cpu"), ops.quantize(w_NK)
    assert torch.equal(on_gpu.codes, on_cpu.codes)
    assert torch.equal(on_gpu.float_absmax(), on_cpu.float_absmax())


@pytest.mark.parametrize("start", [1, 5, 32])
def test_a_slice_that_starts_anywhere_expands(start: int) -> None:
    weight = random_weight((65, 64), nested=False)
    part = weight.to("cuda").rows(start, start + 33)
    expected = reference.dequantize(weight)[start : start + 33]
    assert torch.equal(ops.dequantize(part).cpu(), expected)


def test_values_beyond_the_32_bit_range_are_reached() -> None:
    num_out, num_in = 2**19 + 3, 4096
    num_values = num_out * num_in
    if torch.cuda.mem_get_info()[0] < 4 * num_values:
        pytest.skip("needs 8 GiB of free device memory")
    codes_P = torch.zeros(num_values // 2, dtype=torch.uint8, device="cuda")
    absmax_G = torch.ones(num_values // 64, device="cuda")
    codes_P[-3:] = 0xF7
    absmax_G[-1] = 3
    weight = NF4Weight(codes=codes_P, absmax=absmax_G, shape=(num_out, num_in))
    out_NK = ops.dequantize(weight)
    assert out_NK[-1, -7:].tolist() == [-3, 3, 0, 3, 0, 3, 0]
    assert (out_NK[-4:-1] == -1).all()


@pytest.mark.parametrize("nested", [False, True])
def test_opcheck_passes_on_the_gpu(nested: bool) -> None:
    weight = random_weight((6, 128), nested=nested).to("cuda")
    layer = NF4Linear(weight)
    layout = (weight.shape, 64, "nf4", torch.bfloat16)
    if nested:
        statistics = [
            layer.nested_codes,
            layer.nested_absmax,
            layer.nested_levels,
            layer.nested_offset,
        ]
        operator = torch.ops.flux_nf4.dequantize_4bit_nested.default
        results = torch.library.opcheck(operator, (weight.codes, statistics, 256, *layout))
    else:
        operator = torch.ops.flux_nf4.dequantize_4bit.default
        results = torch.library.opcheck(operator, (weight.codes, layer.absmax, *layout))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("nested", [False, True])
def test_layer_equals_linear_on_the_expanded_weight(nested: bool) -> None:
    weight = random_weight((96, 128), nested=nested)
    layer = NF4Linear(weight, torch.ones(96)).to("cuda")
    x = torch.randn(5, 128, device="cuda", dtype=torch.bfloat16)
    bias = torch.ones(96, device="cuda", dtype=torch.bfloat16)
    expected = functional.linear(x, reference.dequantize(weight).cuda(), bias)
    assert torch.equal(layer(x), expected)


def test_layer_compiles_on_the_gpu() -> None:
    layer = NF4Linear(random_weight((96, 128), nested=False)).to("cuda")
    x = torch.randn(5, 128, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_expansion_can_be_captured_in_a_graph() -> None:
    weight = random_weight((96, 128), nested=True)
    layer = NF4Linear(weight).to("cuda")
    layer.expand(torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_NK = layer.expand(torch.bfloat16)
    graph.replay()
    assert torch.equal(out_NK.cpu(), reference.dequantize(weight))
