"""Schedule, noise, packing and step are Diffusers' bit for bit in float32."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils.torch_utils import randn_tensor

from flux_nf4.formats.facts import FLUX_1_DEV, FLUX_1_SCHNELL
from flux_nf4.pipeline.sampling import (
    draw_noise,
    draw_noise_from,
    euler_step,
    make_schedule,
    pack,
    unpack,
)

SIZES = [(64, 64), (256, 256), (512, 768), (1024, 1024), (896, 1152), (1360, 768), (2048, 2048)]
STEPS = [*range(1, 61), 77, 100, 123, 250, 500, 999, 1000]


def their_schedule(facts, steps, num_tokens):
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=facts.shift,
        use_dynamic_shifting=facts.use_dynamic_shifting,
        base_shift=facts.base_shift,
        max_shift=facts.max_shift,
        base_image_seq_len=facts.base_image_seq_len,
        max_image_seq_len=facts.max_image_seq_len,
    )
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(num_tokens)
    )
    return scheduler


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_schedule_is_theirs_for_every_number_of_steps(width, height):
    num_tokens = width * height // 256
    for steps in STEPS:
        theirs = their_schedule(FLUX_1_DEV, steps, num_tokens).sigmas
        assert torch.equal(make_schedule(steps, num_tokens, FLUX_1_DEV), theirs), steps


def test_the_fixed_schedule_of_schnell_is_theirs_for_every_number_of_steps():
    for steps in STEPS:
        theirs = their_schedule(FLUX_1_SCHNELL, steps, 4096).sigmas
        assert torch.equal(make_schedule(steps, 4096, FLUX_1_SCHNELL), theirs), steps


def test_noise_is_theirs_for_one_generator_an_image():
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    theirs = randn_tensor((2, 16, 32, 24), generator=generators, dtype=torch.float32)
    assert torch.equal(draw_noise([3, 4], width=192, height=256), theirs)


def test_noise_is_theirs_for_one_generator_a_batch():
    theirs = randn_tensor(
        (2, 16, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.float32
    )
    assert torch.equal(draw_noise_from([torch.Generator().manual_seed(3)], 2, 64, 64), theirs)


def test_their_bfloat16_noise_is_ours_rounded():
    generator = torch.Generator().manual_seed(11)
    theirs = randn_tensor((1, 16, 32, 32), generator=generator, dtype=torch.bfloat16)
    assert torch.equal(draw_noise([11], 256, 256).bfloat16(), theirs)


def test_packing_is_theirs():
    latents = torch.randn(2, 16, 12, 8)
    theirs = FluxPipeline._pack_latents(latents, 2, 16, 12, 8)
    assert torch.equal(pack(latents), theirs)
    assert torch.equal(unpack(theirs, 64, 96), FluxPipeline._unpack_latents(theirs, 96, 64, 8))


def test_every_euler_step_is_theirs():
    scheduler = their_schedule(FLUX_1_DEV, 20, 256)
    sigmas = make_schedule(20, 256, FLUX_1_DEV).tolist()
    x = theirs = torch.randn(1, 16, 64)
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = torch.randn(1, 16, 64)
        theirs = scheduler.step(velocity, timestep, theirs, return_dict=False)[0]
        x = euler_step(x, velocity, sigmas[i], sigmas[i + 1])
        assert torch.equal(x, theirs)
