"""The same tiny weights, image and noise in Diffusers' pipelines and ours give the same image."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline
from PIL import Image
from pipelines import HEIGHT, NEGATIVE, PROMPT, SETTINGS, WIDTH, assert_same, make_pipelines
from tolerances import PIPELINE_FP32

from flux_nf4.pipeline.request import GenerationRequest

random = np.random.default_rng(4)
PICTURE = Image.fromarray(random.integers(0, 256, (6, 4, 3), dtype=np.uint8)).resize(
    (WIDTH, HEIGHT), Image.Resampling.BICUBIC
)
# Grey levels and an edge that no 8 x 8 pixels share: what is white enough decides, as do corners.
MASK = Image.fromarray(random.integers(0, 256, (9, 5), dtype=np.uint8)).resize(
    (WIDTH, HEIGHT), Image.Resampling.NEAREST
)
IS_WHITE = np.asarray(MASK) >= 128


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    ours, text_to_image = make_pipelines(tmp_path_factory.mktemp("tiny") / "model")
    from_image = FluxImg2ImgPipeline.from_pipe(text_to_image)
    inpaint = FluxInpaintPipeline.from_pipe(text_to_image)
    for pipeline in (from_image, inpaint):
        pipeline.set_progress_bar_config(disable=True)
    return ours, from_image, inpaint


# 0.1 and 0.15 of 6 steps are less than one; 0.7 of 6 is no whole number in binary or decimal.
@pytest.mark.parametrize("strength", [0.1, 0.15, 0.5, 0.6, 0.7, 0.95, 1.0])
def test_an_image_of_any_strength_gives_the_same_image(pipelines, strength):
    ours, theirs, _ = pipelines
    expected = theirs(
        PROMPT,
        image=PICTURE,
        strength=strength,
        guidance_scale=3.5,
        generator=torch.Generator().manual_seed(7),
        **SETTINGS,
    ).images
    assert_same(ours(PROMPT, image=PICTURE, strength=strength, seed=7, **SETTINGS).images, expected)


def test_as_many_steps_are_run_as_theirs_at_any_strength():
    counts = {"ours": [], "theirs": []}
    for num_steps in range(1, 51):
        schedule = SimpleNamespace(timesteps=list(range(num_steps)), order=1)
        for percent in range(1, 101):
            request = GenerationRequest(
                prompt=PROMPT,
                width=WIDTH,
                height=HEIGHT,
                num_inference_steps=num_steps,
                image=PICTURE,
                strength=percent / 100,
            )
            _, expected = FluxImg2ImgPipeline.get_timesteps(
                SimpleNamespace(scheduler=schedule), num_steps, percent / 100, "cpu"
            )
            counts["ours"].append(request.num_steps)
            counts["theirs"].append(expected)
    assert counts["ours"] == counts["theirs"]


def test_true_guidance_from_an_image_gives_the_same_image(pipelines):
    ours, theirs, _ = pipelines
    settings = {"image": PICTURE, "strength": 0.8, "negative_prompt": NEGATIVE, **SETTINGS}
    expected = theirs(
        PROMPT,
        true_cfg_scale=2.5,
        guidance_scale=3.5,
        generator=torch.Generator().manual_seed(8),
        **settings,
    ).images
    assert_same(ours(PROMPT, guidance_scale=2.5, seed=8, **settings).images, expected)


def test_a_larger_image_of_the_same_shape_is_scaled_alike(pipelines):
    ours, theirs, _ = pipelines
    settings = {"image": PICTURE.resize((200, 300)), "strength": 0.5, **SETTINGS}
    generator = torch.Generator().manual_seed(7)
    expected = theirs(PROMPT, guidance_scale=3.5, generator=generator, **settings).images
    assert_same(ours(PROMPT, seed=7, **settings).images, expected)


@pytest.mark.parametrize("num_generators", [1, 2])
def test_generators_give_the_same_batch(pipelines, num_generators):
    ours, theirs, _ = pipelines
    settings = {"image": PICTURE, "strength": 0.7, "num_images_per_prompt": 2, **SETTINGS}
    batches = []
    for pipeline, more in ((theirs, {"guidance_scale": 3.5}), (ours, {})):
        generators = [torch.Generator().manual_seed(20 + i) for i in range(num_generators)]
        generator = generators if num_generators > 1 else generators[0]
        batches.append(pipeline(PROMPT, generator=generator, **settings, **more).images)
    assert_same(batches[1], batches[0])


@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
def test_latents_of_inpainting_are_theirs(pipelines, strength):
    ours, _, theirs = pipelines
    settings = SETTINGS | {"output_type": "latent"}
    settings |= {"image": PICTURE, "mask_image": MASK, "strength": strength}
    generator = torch.Generator().manual_seed(7)
    expected = theirs(PROMPT, guidance_scale=3.5, generator=generator, **settings).images
    latents = ours(PROMPT, seed=7, **settings).images
    np.testing.assert_allclose(latents, expected, atol=PIPELINE_FP32 * expected.abs().max().item())


def test_inpainting_is_theirs_inside_the_mask_and_the_image_outside(pipelines):
    ours, _, theirs = pipelines
    settings = {"image": PICTURE, "mask_image": MASK, "strength": 0.8, **SETTINGS}
    generator = torch.Generator().manual_seed(7)
    expected = theirs(PROMPT, guidance_scale=3.5, generator=generator, **settings).images
    expected[:, ~IS_WHITE] = np.asarray(PICTURE)[~IS_WHITE] / 255
    assert_same(ours(PROMPT, seed=7, **settings).images, expected)


def test_a_callback_sees_what_theirs_sees(pipelines):
    ours, _, theirs = pipelines
    settings = {"image": PICTURE, "mask_image": MASK, "strength": 0.6, **SETTINGS}
    seen = {"ours": [], "theirs": []}

    def look(name):
        def callback(pipeline, step, timestep, tensors):
            seen[name].append((step, float(timestep), tensors["latents"].numpy()))
            return tensors

        return callback

    ours(PROMPT, seed=7, callback_on_step_end=look("ours"), **settings)
    generator = torch.Generator().manual_seed(7)
    theirs(
        PROMPT,
        guidance_scale=3.5,
        generator=generator,
        callback_on_step_end=look("theirs"),
        **settings,
    )
    assert [step for step, *_ in seen["ours"]] == [step for step, *_ in seen["theirs"]]
    for (_, our_time, our_latents), (_, their_time, their_latents) in zip(
        *seen.values(), strict=True
    ):
        assert our_time == pytest.approx(their_time)
        scale = np.abs(their_latents).max()
        np.testing.assert_allclose(our_latents, their_latents, atol=PIPELINE_FP32 * scale)
