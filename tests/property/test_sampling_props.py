from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from flux_nf4.errors import InputError
from flux_nf4.formats.facts import FLUX_1_DEV
from flux_nf4.pipeline.limits import check_size, nearest_sizes
from flux_nf4.pipeline.sampling import (
    draw_noise,
    euler_step,
    make_schedule,
    pack,
    unpack,
)

tokens = st.integers(4, 12)


@given(tokens, tokens, st.integers(1, 3))
def test_unpack_undoes_pack(rows, columns, batch):
    latents = torch.randn(batch, 16, 2 * rows, 2 * columns)
    assert torch.equal(unpack(pack(latents), 16 * columns, 16 * rows), latents)


@given(st.integers(-100, 10_000))
def test_a_size_is_accepted_or_its_neighbours_are(size):
    for legal in nearest_sizes(size):
        check_size(legal, legal)
    try:
        check_size(size, 64)
    except InputError:
        assert size not in nearest_sizes(size)
    else:
        assert nearest_sizes(size) == (size,)


@given(st.integers(1, 1000), st.integers(16, 16_384), st.sampled_from(["flux", "forge"]))
def test_every_schedule_falls_strictly_from_one_to_zero(steps, num_tokens, kind):
    sigmas = make_schedule(steps, num_tokens, FLUX_1_DEV, kind=kind)
    assert len(sigmas) == steps + 1
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@given(st.integers(1, 60), st.integers(16, 4096))
def test_the_true_velocity_leads_to_the_image_in_any_number_of_steps(steps, num_tokens):
    image, x = torch.randn(2, 1, 2, 64)
    velocity = x - image
    sigmas = make_schedule(steps, num_tokens, FLUX_1_DEV).tolist()
    for sigma, next_sigma in pairwise(sigmas):
        x = euler_step(x, velocity, sigma, next_sigma)
    torch.testing.assert_close(x, image, atol=1e-4, rtol=1e-4)


@given(st.integers(0, 2**64 - 3))
def test_no_seed_is_out_of_reach(seed):
    assert draw_noise([seed, seed + 2], 64, 64).isfinite().all()
