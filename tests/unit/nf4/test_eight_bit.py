"""Eight-bit rows and products: what holds whatever the rounding, and how far they are off."""

import pytest
import torch
from tolerances import EIGHT_BIT_PRODUCT, ROTATION_FP32, relative_error

from flux_nf4.errors import InputError
from flux_nf4.nf4 import eight_bit, ops, reference
from flux_nf4.nf4.codec import NF4Weight
from flux_nf4.nf4.linear import NF4Linear
from flux_nf4.nf4.scratch import release, scratch

both = pytest.mark.parametrize("arithmetic", ["fp8", "int8"])


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


def random_layer(*, nested=False, block_size=64, shape=(48, 256)):
    weight = reference.quantize(random(*shape), block_size=block_size, nested=nested)
    return NF4Linear(weight, random(shape[0]))


def test_rotation_is_the_walsh_hadamard_matrix():
    signs = eight_bit.rotate(torch.eye(64)) * 8
    bits = torch.arange(64)
    parity = sum(((bits[:, None] & bits) >> bit) & 1 for bit in range(6)) % 2
    assert torch.equal(signs, 1.0 - 2 * parity)


def test_rotating_twice_changes_nothing():
    x = random(3, 192)
    assert relative_error(eight_bit.rotate(eight_bit.rotate(x)), x) < ROTATION_FP32


def test_rotation_keeps_products():
    x, w = random(3, 192), random(5, 192)
    turned = eight_bit.rotate(x) @ eight_bit.rotate(w).t()
    assert relative_error(turned, x @ w.t()) < ROTATION_FP32


def test_fp8_scale_is_the_largest_absmax_of_the_row_over_448():
    layer = random_layer()
    layer.absmax[::5] *= -1
    layer.set_arithmetic("fp8")
    assert torch.equal(layer.row_scales()[0], layer.absmax.abs().view(48, -1).amax(1) / 448)


@both
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block_size", [64, 128])
def test_product_is_near_the_exact_one(arithmetic, nested, block_size):
    layer, x = random_layer(nested=nested, block_size=block_size), random(2, 7, 256)
    exact = layer(x)
    layer.set_arithmetic(arithmetic)
    assert 0 < relative_error(layer(x), exact) < EIGHT_BIT_PRODUCT[arithmetic]


@both
def test_negative_absmax_is_followed(arithmetic):
    layer, x = random_layer(), random(7, 256)
    layer.absmax[1::3] *= -1
    exact = layer(x)
    layer.set_arithmetic(arithmetic)
    assert relative_error(layer(x), exact) < EIGHT_BIT_PRODUCT[arithmetic]


@both
@pytest.mark.parametrize("shape", [(256,), (0, 256), (1, 0, 256)])
def test_a_lone_token_and_none_at_all_are_multiplied(arithmetic, shape):
    layer, x = random_layer(), random(*shape) if shape[0] else torch.zeros(shape)
    layer.set_arithmetic(arithmetic)
    assert torch.equal(layer(x), layer(x.reshape(-1, 256)).view(*shape[:-1], 48))


def test_rotation_hides_an_outlier_from_int8():
    layer, x = random_layer(), random(7, 256)
    x[:, 3] *= 100
    exact = layer(x)
    layer.set_arithmetic("int8")
    rotated = relative_error(layer(x), exact)
    scale = x.abs().amax(-1, keepdim=True) / 127
    plain = layer.bias + (x / scale).round() * scale @ layer.expand(torch.float32).t()
    assert 4 * rotated < relative_error(plain, exact) * 5


def test_integers_are_summed_exactly():
    x_MK = torch.full((1, 15360), 127, dtype=torch.int8)
    w_NK = torch.full((8, 15360), 127, dtype=torch.int8)
    w_NK[:, -1] = 126
    unit = torch.ones(1, 1)
    sums = eight_bit.multiply(x_MK, unit, w_NK, unit[0].expand(8), None, torch.float64)
    # Not a float32: the nearest ones are 16 apart.
    assert abs(float(sums[0, 0]) - (15360 * 127**2 - 127)) <= 8


@both
def test_rows_of_zeros_stay_zeros(arithmetic):
    rows = eight_bit.quantize_rows(torch.zeros(2, 64), arithmetic)
    assert not (rows.values.float() * rows.scale).any()


@both
def test_a_weight_of_zeros_multiplies_to_the_bias(arithmetic):
    layer = NF4Linear(reference.quantize(torch.zeros(16, 64)), random(16))
    layer.set_arithmetic(arithmetic)
    assert torch.equal(layer(random(2, 64)), layer.bias.expand(2, 16))


@both
def test_a_block_of_zeros_may_have_any_absmax(arithmetic):
    w_NK = random(16, 256)
    w_NK[:, 64:128] = 0
    layer = NF4Linear(reference.quantize(w_NK))
    exact = layer(x := random(3, 256))
    layer.absmax.view(16, 4)[:, 1] = 1e30 if arithmetic == "int8" else 1e-30
    layer.set_arithmetic(arithmetic)
    assert relative_error(layer(x), exact) < EIGHT_BIT_PRODUCT[arithmetic]


@both
def test_nan_comes_through(arithmetic):
    layer, x = random_layer(), random(3, 256)
    x[1, 7] = torch.nan
    layer.set_arithmetic(arithmetic)
    assert layer(x).isnan().all(dim=1).tolist() == [False, True, False]


@both
def test_with_gradients_the_product_is_exact(arithmetic):
    layer, x = random_layer(), random(3, 256)
    exact = layer(x)
    layer.set_arithmetic(arithmetic)
    assert torch.equal(layer(x.requires_grad_()), exact)


@both
def test_quantised_rows_multiply_as_the_layer_quantises_itself(arithmetic):
    layer, x = random_layer(), random(2, 3, 256)
    layer.set_arithmetic(arithmetic)
    rows = eight_bit.quantize_rows(x, arithmetic)
    assert torch.equal(layer.multiply(rows, torch.float32), layer(x))


@both
def test_state_and_weight_are_those_of_nf4(arithmetic):
    layer = random_layer(nested=True)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.set_arithmetic(arithmetic)
    layer(random(1, 256))
    assert layer.state_dict().keys() == before.keys()
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())


def test_scales_outlive_the_weight():
    layer = random_layer()
    layer.set_arithmetic("fp8")
    scale_N, _ = layer.row_scales()
    layer.codes, layer.absmax = layer.codes.to("meta"), layer.absmax.to("meta")
    assert layer.row_scales()[0] is scale_N


@both
def test_another_weight_that_is_loaded_gets_scales_of_its_own(arithmetic):
    layer, x = random_layer(), random(7, 256)
    other = NF4Linear(reference.quantize(100 * random(48, 256)), layer.bias)
    exact = other(x)
    layer.set_arithmetic(arithmetic)
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert relative_error(layer(x), exact) < EIGHT_BIT_PRODUCT[arithmetic]


def test_a_weight_whose_rows_end_within_blocks_is_refused():
    layer = NF4Linear(reference.quantize(random(16, 96)))
    with pytest.raises(InputError, match="16 x 96 cannot be multiplied in `int8`"):
        layer.set_arithmetic("int8")


def test_a_weight_with_columns_for_no_kernel_stays_exact():
    assert not NF4Linear(reference.quantize(random(17, 64))).fits_eight_bit


def test_transient_weight_equals_the_expansion():
    for nested in (False, True):
        layer = random_layer(nested=nested)
        weight: NF4Weight = layer.weight
        expected = ops.dequantize(weight, torch.bfloat16)
        assert torch.equal(layer.expand_for_product(torch.bfloat16, None), expected)


def test_scratch_is_the_same_memory_each_time():
    first = scratch((4, 8), torch.bfloat16, torch.device("cpu"))
    assert scratch((2, 3), torch.int8, torch.device("cpu")).data_ptr() == first.data_ptr()


def test_scratch_grows_to_what_is_asked():
    release()
    scratch((4,), torch.int8, torch.device("cpu"))
    assert scratch((100, 3), torch.float32, torch.device("cpu")).shape == (100, 3)


def test_scratch_made_in_inference_mode_serves_outside():
    release()
    with torch.inference_mode():
        scratch((4,), torch.float32, torch.device("cpu"))
    assert not scratch((4,), torch.float32, torch.device("cpu")).fill_(1).is_inference()
