"""The same tiny weights in Diffusers' FluxPipeline and in ours give the same image."""

import numpy as np
import pytest
import torch
from pipelines import NEGATIVE, PROMPT, SETTINGS, assert_same, make_pipelines
from tolerances import PIPELINE_FP32

from flux_nf4.pipeline.decode import decode_latents
from flux_nf4.pipeline.generate import GenerationRequest, LatentsDone, generate_latents
from flux_nf4.pipeline.sampling import draw_noise


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return make_pipelines(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize("guidance", [3.5, 1.5])
def test_the_same_seed_and_guidance_give_the_same_image(pipelines, guidance):
    ours, theirs = pipelines
    generator = torch.Generator().manual_seed(7)
    expected = theirs(PROMPT, guidance_scale=guidance, generator=generator, **SETTINGS).images
    image = ours(PROMPT, distilled_guidance_scale=guidance, seed=7, **SETTINGS).images
    assert_same(image, expected)


def test_true_guidance_with_a_negative_prompt_gives_the_same_image(pipelines):
    ours, theirs = pipelines
    expected = theirs(
        PROMPT,
        negative_prompt=NEGATIVE,
        true_cfg_scale=2.5,
        guidance_scale=3.5,
        generator=torch.Generator().manual_seed(8),
        **SETTINGS,
    ).images
    image = ours(PROMPT, negative_prompt=NEGATIVE, guidance_scale=2.5, seed=8, **SETTINGS).images
    assert_same(image, expected)


def test_the_same_generator_gives_the_same_batch(pipelines):
    ours, theirs = pipelines
    calls = [
        pipeline(
            PROMPT,
            num_images_per_prompt=2,
            generator=torch.Generator().manual_seed(9),
            **{name: scale},
            **SETTINGS,
        ).images
        for pipeline, name, scale in (
            (ours, "distilled_guidance_scale", 3.5),
            (theirs, "guidance_scale", 3.5),
        )
    ]
    assert_same(*calls)


def test_two_prompts_with_a_generator_each_give_the_same_images(pipelines):
    ours, theirs = pipelines
    generators = [torch.Generator().manual_seed(seed) for seed in (20, 21)]
    expected = theirs(
        [PROMPT, "a cat"], guidance_scale=3.5, generator=generators, **SETTINGS
    ).images
    image = ours([PROMPT, "a cat"], seed=20, **SETTINGS).images
    assert_same(image, expected)


def test_a_batch_in_one_pass_gives_the_same_images(pipelines):
    ours, theirs = pipelines
    generators = [torch.Generator().manual_seed(seed) for seed in (30, 31)]
    expected = theirs(
        PROMPT, guidance_scale=3.5, num_images_per_prompt=2, generator=generators, **SETTINGS
    ).images
    request = GenerationRequest(
        prompt=PROMPT,
        width=64,
        height=96,
        num_inference_steps=6,
        max_sequence_length=24,
        seed=30,
        num_images=2,
        batch_size=2,
    )
    events = generate_latents(ours.model, request)
    (latents,) = [event.tokens for event in events if isinstance(event, LatentsDone)]
    with torch.inference_mode():
        images = decode_latents(ours.model, latents, 64, 96)
    assert_same(images.permute(0, 2, 3, 1).numpy(), expected)


def test_latents_given_and_latents_given_back_are_theirs(pipelines):
    ours, theirs = pipelines
    from flux_nf4.pipeline.sampling import pack

    settings = SETTINGS | {"output_type": "latent"}
    noise = pack(draw_noise([1], 64, 96))
    expected = theirs(PROMPT, guidance_scale=3.5, latents=noise, **settings).images
    latents = ours(PROMPT, latents=noise, **settings).images
    np.testing.assert_allclose(latents, expected, atol=PIPELINE_FP32 * expected.abs().max().item())


def test_an_empty_and_an_overlong_prompt_give_the_same_image(pipelines):
    ours, theirs = pipelines
    for prompt in ("", "a big dog on the apple " * 30):
        generator = torch.Generator().manual_seed(7)
        expected = theirs(prompt, guidance_scale=3.5, generator=generator, **SETTINGS).images
        assert_same(ours(prompt, seed=7, **SETTINGS).images, expected)
