import pytest
import torch

from flux_nf4.errors import InputError, ShapeError
from flux_nf4.formats.facts import FLUX_1_DEV, FLUX_1_SCHNELL
from flux_nf4.pipeline.limits import MAX_SEED, check_size, nearest_sizes
from flux_nf4.pipeline.sampling import (
    draw_noise,
    draw_noise_from,
    euler_step,
    guide,
    make_schedule,
    pack,
    predict_image,
    shift_exponent,
    token_grid,
    unpack,
)


@pytest.mark.parametrize(("size", "nearest"), [(1000, (992, 1008)), (256, (256,)), (65, (64, 80))])
def test_a_size_has_its_two_legal_neighbours(size, nearest):
    assert nearest_sizes(size) == nearest


@pytest.mark.parametrize(("size", "nearest"), [(-3, (64,)), (0, (64,)), (9999, (4096,))])
def test_a_size_beyond_a_limit_has_the_limit_as_neighbour(size, nearest):
    assert nearest_sizes(size) == nearest


def test_an_odd_width_names_the_two_nearest_sizes():
    with pytest.raises(InputError, match=r"width of 1000 .*\nhint: use a width of 992 or 1008"):
        check_size(1000, 1024)


def test_a_height_beyond_the_limit_names_the_limit():
    with pytest.raises(InputError, match="use a height of 4096"):
        check_size(1024, 5000)


@pytest.mark.parametrize("width", [256.0, "256", True, None])
def test_a_width_that_is_no_whole_number_is_refused(width):
    with pytest.raises(InputError, match="whole number"):
        check_size(width, 256)


def test_rows_come_from_the_height():
    assert token_grid(width=896, height=1152) == (72, 56)


def test_the_shift_exponent_meets_both_fitted_counts():
    assert shift_exponent(256, FLUX_1_DEV) == pytest.approx(0.5)
    assert shift_exponent(4096, FLUX_1_DEV) == pytest.approx(1.15)


def test_a_schedule_falls_from_one_to_zero():
    sigmas = make_schedule(20, 4096, FLUX_1_DEV)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_schnell_steps_are_even():
    assert make_schedule(4, 4096, FLUX_1_SCHNELL).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_forge_shifts_small_images_as_flux_shifts_1024_square():
    forge = make_schedule(20, 256, FLUX_1_DEV, kind="forge")
    assert torch.equal(forge, make_schedule(20, 4096, FLUX_1_DEV))


def test_forge_leaves_schnell_as_it_is():
    forge = make_schedule(4, 256, FLUX_1_SCHNELL, kind="forge")
    assert torch.equal(forge, make_schedule(4, 256, FLUX_1_SCHNELL))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_out_of_range_is_refused(steps):
    with pytest.raises(InputError, match="1 to 1000"):
        make_schedule(steps, 256, FLUX_1_DEV)


def test_the_first_noise_of_seed_zero_is_what_it_always_was():
    # float32, CPU, PyTorch's Mersenne twister: what Diffusers, Forge and A1111 draw as well
    assert draw_noise([0], 64, 64)[0, 0, 0, :3].tolist() == pytest.approx(
        [-1.1258398294448853, -1.152360200881958, -0.2505785822868347], abs=0
    )


def test_an_image_of_a_batch_can_be_repeated_alone():
    batch = draw_noise([7, 8, 9], 64, 96)
    assert torch.equal(batch[1:2], draw_noise([8], 64, 96))


def test_noise_has_the_shape_of_the_latent():
    assert draw_noise([MAX_SEED], 64, 96).shape == (1, 16, 12, 8)


def test_noise_of_a_plain_global_seed_is_the_same():
    # How A1111 and Forge draw with their CPU source: no batch axis.
    expected = torch.randn(16, 32, 32, generator=torch.Generator().manual_seed(5))
    assert torch.equal(draw_noise([5], 256, 256)[0], expected)


def test_a_generator_goes_on_from_image_to_image():
    generator = torch.Generator().manual_seed(1)
    both = draw_noise_from([torch.Generator().manual_seed(1)], 2, 64, 64)
    first = draw_noise_from([generator], 1, 64, 64)
    second = draw_noise_from([generator], 1, 64, 64)
    assert torch.equal(both, torch.cat((first, second)))


def test_a_token_holds_a_square_of_each_channel():
    latents = torch.arange(2 * 4 * 4).reshape(1, 2, 4, 4)
    assert pack(latents)[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]


def test_latents_of_odd_height_do_not_pack():
    with pytest.raises(ShapeError, match="3 x 4"):
        pack(torch.zeros(1, 16, 3, 4))


def test_tokens_of_another_size_do_not_unpack():
    with pytest.raises(ShapeError, match="64 x 64"):
        unpack(torch.zeros(1, 15, 64), 64, 64)


def test_an_euler_step_follows_the_velocity():
    x, v = torch.ones(1, 1, 1), torch.full((1, 1, 1), 2.0)
    assert euler_step(x, v, 1.0, 0.75).item() == 0.5


def test_an_euler_step_stays_in_float32():
    x, v = torch.ones(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bfloat16)
    assert euler_step(x, v, 1.0, 0.5).dtype == torch.float32


def test_guidance_of_one_is_the_prompt_alone():
    positive, negative = torch.full((1, 1, 1), 3.0), torch.full((1, 1, 1), 1.0)
    assert guide(positive, negative, 1.0).item() == 3.0


def test_guidance_of_two_goes_as_far_again():
    positive, negative = torch.full((1, 1, 1), 3.0), torch.full((1, 1, 1), 1.0)
    assert guide(positive, negative, 2.0).item() == 5.0


def test_the_true_velocity_predicts_the_image_from_any_time():
    image, noise = torch.randn(2, 1, 4, 64, generator=torch.Generator().manual_seed(0))
    x = 0.25 * noise + 0.75 * image
    torch.testing.assert_close(predict_image(x, noise - image, 0.25), image)
