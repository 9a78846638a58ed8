"""NF4Linear against `F.linear` on the dequantised weight: the same arithmetic, so the same bits."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from flux_nf4.errors import InputError, ShapeError
from flux_nf4.nf4 import ops
from flux_nf4.nf4.codec import NestedAbsmax, NF4Weight
from flux_nf4.nf4.linear import NF4Linear

GENERATOR_SEED = 0

# torch 2.13's own tracer instantiates every autograd function that it meets.
TRACER_WARNING = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)


def random_layer(*, nested: bool = False, bias: bool = True) -> NF4Linear:
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    weight = ops.quantize(torch.randn(96, 128, generator=generator).bfloat16(), nested=nested)
    return NF4Linear(weight, torch.randn(96, generator=generator).bfloat16() if bias else None)


def random_input(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(GENERATOR_SEED + 1)
    return torch.randn(2, 5, 128, generator=generator).to(dtype)


def with_gaps(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x], 1)[:, 0]


def plain_linear(layer: NF4Linear, x: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return functional.linear(x, ops.dequantize(layer.weight, x.dtype), bias)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_forward_equals_linear_on_the_expanded_weight(
    nested: bool, bias: bool, dtype: torch.dtype
) -> None:
    layer, x = random_layer(nested=nested, bias=bias), random_input(dtype)
    assert torch.equal(layer(x), plain_linear(layer, x))


@pytest.mark.parametrize("nested", [False, True])
def test_forward_is_the_same_with_gradients(nested: bool) -> None:
    layer, x = random_layer(nested=nested), random_input(torch.bfloat16)
    assert torch.equal(layer(x.clone().requires_grad_()), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_input_gradient_equals_that_of_linear(dtype: torch.dtype) -> None:
    layer, x = random_layer(), random_input(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(ours).square().sum().backward()
    plain_linear(layer, theirs).square().sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


def test_gradient_passes_gradcheck() -> None:
    x = random_input(torch.float64)[0, :2].requires_grad_()
    assert torch.autograd.gradcheck(random_layer(), (x,))


def test_expanded_weight_is_not_kept_for_backward() -> None:
    saved: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        random_layer()(random_input().requires_grad_())
    assert torch.Size((96, 128)) not in saved


def test_layer_has_nothing_to_train() -> None:
    assert list(random_layer().parameters()) == []


@TRACER_WARNING
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_layer_compiles_without_a_graph_break(nested: bool, gradient: bool) -> None:
    layer, x = random_layer(nested=nested), random_input().requires_grad_(gradient)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), plain_linear(layer, x))


@TRACER_WARNING
def test_compiled_gradient_equals_the_eager_one() -> None:
    layer, x = random_layer(), random_input()
    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(eager).sum().backward()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(compiled).sum().backward()
    assert eager.grad is not None
    assert compiled.grad is not None
    assert torch.equal(eager.grad, compiled.grad)


@pytest.mark.parametrize("nested", [False, True])
def test_casting_the_layer_casts_no_buffer(nested: bool) -> None:
    layer = random_layer(nested=nested)
    before = {name: (tensor.dtype, tensor.clone()) for name, tensor in layer.state_dict().items()}
    layer.to(torch.float64).half().bfloat16()
    after = layer.state_dict()
    assert all(after[name].dtype == dtype for name, (dtype, _) in before.items())
    assert all(torch.equal(after[name], tensor) for name, (_, tensor) in before.items())


def test_casting_a_parent_casts_no_buffer() -> None:
    layer = random_layer()
    torch.nn.Sequential(layer, torch.nn.LayerNorm(96)).to(torch.bfloat16)
    assert layer.absmax.dtype == torch.float32


def test_layer_moves_to_another_device_with_a_cast() -> None:
    layer = random_layer(nested=True).to("meta", torch.float16)
    found = {(tensor.device.type, tensor.dtype) for tensor in layer.state_dict().values()}
    dtypes = {torch.uint8, torch.float32, torch.bfloat16}
    assert found == {("meta", dtype) for dtype in dtypes}


def test_state_of_v2_is_codes_absmax_and_bias() -> None:
    assert list(random_layer().state_dict()) == ["codes", "absmax", "bias"]


def test_state_of_v1_names_the_nested_statistics() -> None:
    names = ["codes", "nested_codes", "nested_absmax", "nested_levels", "nested_offset"]
    assert list(random_layer(nested=True, bias=False).state_dict()) == names


@pytest.mark.parametrize("nested", [False, True])
def test_state_loads_into_another_layer(nested: bool) -> None:
    layer, x = random_layer(nested=nested), random_input()
    zeros = ops.quantize(torch.zeros(96, 128).bfloat16(), nested=nested)
    other = NF4Linear(zeros, torch.zeros(96).bfloat16())
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("nested", [False, True])
def test_weight_comes_back_as_it_went_in(nested: bool) -> None:
    weight = ops.quantize(torch.linspace(-1, 1, 256).view(2, 128).half(), nested=nested)
    back = NF4Linear(weight).weight
    assert (back.shape, back.dtype, back.is_nested) == (weight.shape, weight.dtype, nested)
    assert torch.equal(ops.dequantize(back), ops.dequantize(weight))


@pytest.mark.parametrize("nested", [False, True])
def test_layer_closes_gaps(nested: bool) -> None:
    weight = ops.quantize(torch.ones(96, 128), nested=nested)
    absmax = weight.absmax
    if isinstance(absmax, NestedAbsmax):
        absmax = replace(absmax, codes=with_gaps(absmax.codes))
    else:
        absmax = with_gaps(absmax)
    layer = NF4Linear(replace(weight, codes=with_gaps(weight.codes), absmax=absmax))
    assert all(buffer.is_contiguous() for buffer in layer.buffers())


def test_layer_shares_memory_with_the_weight() -> None:
    weight = ops.quantize(torch.ones(1, 64))
    assert NF4Linear(weight).weight.codes.data_ptr() == weight.codes.data_ptr()


def test_a_copy_is_independent() -> None:
    layer = random_layer()
    copy.deepcopy(layer).codes.zero_()
    assert layer.codes.any()


def test_bias_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"bias must have shape \(96,\), got \(95,\)"):
        NF4Linear(random_layer().weight, torch.zeros(95))


@pytest.mark.parametrize("shape", [(), (64,), (2, 96)])
def test_input_of_the_wrong_width_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="last dimension must be 128"):
        random_layer()(torch.zeros(shape))


def test_input_of_integers_is_refused() -> None:
    with pytest.raises(InputError, match=r"not torch\.int64"):
        random_layer()(torch.zeros(2, 128, dtype=torch.int64))


def test_repr_tells_what_the_layer_is() -> None:
    expected = "NF4Linear(in_features=128, out_features=96, bias=True, nf4, block_size=64, nested)"
    assert repr(random_layer(nested=True)) == expected


def test_layer_takes_over_sizes_from_the_weight() -> None:
    weight: NF4Weight = ops.quantize(torch.ones(3, 128), block_size=128)
    layer = NF4Linear(weight)
    assert (layer.out_features, layer.in_features, layer.block_size) == (3, 128, 128)
