import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from PIL import ImageColor

from flux_nf4.errors import Cancelled, NumericalError, ShapeError
from flux_nf4.pipeline.decode import preview
from flux_nf4.pipeline.events import ImageDone, Notice, StageStarted, StepDone
from flux_nf4.pipeline.generate import (
    GenerationRequest,
    LatentsDone,
    generate,
    generate_latents,
)
from flux_nf4.pipeline.load import LoadSettings, load_model
from flux_nf4.pipeline.sampling import draw_noise, pack

REQUEST = GenerationRequest(
    prompt="a red apple", width=64, height=80, num_inference_steps=3, max_sequence_length=8
)


def run(model, **changes):
    return list(generate(model, dataclasses.replace(REQUEST, **changes)))


def pictures(events):
    return [np.asarray(event.image) for event in events if isinstance(event, ImageDone)]


def notices(model, **changes):
    return [event.message for event in run(model, **changes) if isinstance(event, Notice)]


@contextlib.contextmanager
def poisoned(parameter):
    """One NaN in a weight, and the weight as it was afterwards."""
    saved = parameter.data.clone()
    parameter.data.view(-1)[0] = torch.nan
    try:
        yield
    finally:
        parameter.data.copy_(saved)


def test_stages_and_steps_come_in_order(tiny_model):
    told = [
        event.stage if isinstance(event, StageStarted) else type(event).__name__
        for event in run(tiny_model)
    ]
    assert told == ["text", "modulation", "denoise", *["StepDone"] * 3, "decode", "ImageDone"]


def test_every_step_says_its_number(tiny_model):
    steps = [(e.step, e.num_steps) for e in run(tiny_model) if isinstance(e, StepDone)]
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_the_image_has_the_size_asked_for(tiny_model):
    (picture,) = pictures(run(tiny_model))
    assert picture.shape == (80, 64, 3)


def test_the_same_request_gives_the_same_image(tiny_model):
    assert np.array_equal(pictures(run(tiny_model)), pictures(run(tiny_model)))


def test_another_seed_gives_another_image(tiny_model):
    assert not np.array_equal(pictures(run(tiny_model)), pictures(run(tiny_model, seed=1)))


def test_any_image_of_a_request_can_be_repeated_alone(tiny_model):
    events = run(tiny_model, seed=5, num_images=3)
    last = [event for event in events if isinstance(event, ImageDone)][2]
    assert (last.index, last.seed) == (2, 7)
    assert np.array_equal(pictures(events)[2], pictures(run(tiny_model, seed=7))[0])


def test_a_batch_gives_the_images_of_single_runs(tiny_model):
    batch = pictures(run(tiny_model, num_images=3, batch_size=2))
    single = pictures(run(tiny_model, num_images=3))
    # A level of 255 may round the other way: sums run in another order in a batch.
    assert np.abs(np.subtract(batch, single, dtype=np.int16)).max() <= 1


def test_the_last_batch_takes_what_is_left(tiny_model):
    events = run(tiny_model, num_images=3, batch_size=2)
    assert [event.index for event in events if isinstance(event, ImageDone)] == [0, 1, 2]
    assert sum(isinstance(event, StepDone) for event in events) == 6


def test_text_is_encoded_once_for_all_images(tiny_model):
    events = run(tiny_model, num_images=3)
    assert sum(event == StageStarted(stage="text") for event in events) == 1


def test_true_guidance_changes_the_image(tiny_model):
    plain, guided = run(tiny_model), run(tiny_model, guidance_scale=4.0)
    assert not np.array_equal(pictures(plain), pictures(guided))


def test_a_negative_prompt_changes_a_guided_image(tiny_model):
    one = run(tiny_model, guidance_scale=4.0, negative_prompt="a dog")
    other = run(tiny_model, guidance_scale=4.0, negative_prompt="the background")
    assert not np.array_equal(pictures(one), pictures(other))


def test_distilled_guidance_changes_the_image(tiny_model):
    events = run(tiny_model, distilled_guidance_scale=1.0)
    assert not np.array_equal(pictures(run(tiny_model)), pictures(events))


def test_the_forge_schedule_changes_a_small_image(tiny_model):
    events = run(tiny_model, schedule="forge")
    assert not np.array_equal(pictures(run(tiny_model)), pictures(events))


def test_cancelling_is_asked_before_every_step(tiny_model):
    steps = []
    events = generate(tiny_model, REQUEST, is_cancelled=lambda: len(steps) == 2)

    def count():
        for event in events:
            steps.extend([event.step] if isinstance(event, StepDone) else [])

    with pytest.raises(Cancelled):
        count()
    assert steps == [1, 2]


def test_cancelling_before_the_start_computes_nothing(tiny_model):
    events = generate(tiny_model, REQUEST, is_cancelled=lambda: True)
    assert next(events) == StageStarted(stage="text")
    with pytest.raises(Cancelled):
        next(events)


def test_a_caller_is_not_left_in_inference_mode(tiny_model):
    events = generate(tiny_model, REQUEST)
    for _ in range(5):
        next(events)
        assert not torch.is_inference_mode_enabled()
    events.close()


def test_no_preview_comes_unless_asked_for(tiny_model):
    assert all(e.preview is None for e in run(tiny_model) if isinstance(e, StepDone))


def test_every_step_shows_a_preview_where_there_are_as_many(tiny_model):
    previews = [e.preview for e in run(tiny_model, num_previews=5) if isinstance(e, StepDone)]
    assert [preview.size for preview in previews] == [(64, 80)] * 3


@pytest.mark.parametrize(
    ("num_previews", "steps"), [(1, [7]), (2, [4, 7]), (3, [3, 5, 7]), (6, [2, 3, 4, 5, 6, 7])]
)
def test_previews_are_spread_over_the_steps(tiny_model, num_previews, steps):
    events = run(tiny_model, num_inference_steps=7, num_previews=num_previews)
    shown = [e.step for e in events if isinstance(e, StepDone) and e.preview is not None]
    assert shown == steps


def test_a_preview_of_a_large_image_is_small(tiny_model):
    events = run(tiny_model, width=512, height=256, num_inference_steps=1, num_previews=1)
    (preview,) = [e.preview for e in events if isinstance(e, StepDone)]
    assert preview.size == (256, 128)


def test_a_preview_has_the_colours_of_the_image():
    demo = load_model(None, LoadSettings(device="cpu", dtype=torch.float32))
    names = ("red", "green", "blue", "yellow", "white", "black", "grey")
    expected = np.array([ImageColor.getrgb(name) for name in names])
    images = torch.tensor(expected)[:, :, None, None].expand(-1, -1, 64, 64)
    with torch.inference_mode():
        means, _ = demo.autoencoder.encode(images / 127.5 - 1)
        shown = np.array(
            [np.asarray(preview(demo, tokens[None], 64, 64))[32, 32] for tokens in pack(means)]
        )
    distances = np.abs(shown[:, None].astype(int) - expected).sum(-1)
    assert distances.argmin(1).tolist() == list(range(len(names)))


def test_a_preview_does_not_change_the_image(tiny_model):
    assert np.array_equal(pictures(run(tiny_model)), pictures(run(tiny_model, num_previews=3)))


def test_nan_in_t5_names_the_stage(tiny_model):
    with (
        poisoned(next(tiny_model.t5.parameters())),
        pytest.raises(NumericalError, match="`text`"),
    ):
        run(tiny_model, prompt="<pad>")


def test_nan_in_the_conditioner_names_the_stage(tiny_model):
    with (
        poisoned(next(tiny_model.transformer.conditioner.parameters())),
        pytest.raises(NumericalError, match="stage `modulation`"),
    ):
        run(tiny_model)


def test_nan_in_the_blocks_names_the_step(tiny_model):
    with (
        poisoned(next(tiny_model.transformer.blocks.parameters())),
        pytest.raises(NumericalError, match="stage `denoise`, step 1 of 3"),
    ):
        run(tiny_model)


def test_nan_in_the_vae_names_the_stage(tiny_model):
    decoder = tiny_model.autoencoder.model.decoder
    with (
        poisoned(next(decoder.parameters())),
        pytest.raises(NumericalError, match="stage `decode`"),
    ):
        run(tiny_model)


def test_a_prompt_that_fits_needs_no_notice(tiny_model):
    assert notices(tiny_model) == []


def test_an_empty_prompt_is_allowed_and_told(tiny_model):
    assert notices(tiny_model, prompt="  ") == [
        "the prompt is empty: the model draws what it likes"
    ]


def test_a_truncated_prompt_tells_the_words_that_were_not_read(tiny_model):
    (message,) = notices(tiny_model, prompt="a red cat in the big apple on a dog")
    assert message == "the prompt is longer than 8 tokens; not read: `on a dog`"


def test_a_truncated_negative_prompt_is_told(tiny_model):
    (message,) = notices(tiny_model, negative_prompt="a cat " * 9, guidance_scale=2.0)
    assert message.startswith("the negative prompt is longer than 8 tokens; not read: `cat a cat")


def test_a_prompt_too_long_for_clip_alone_is_told(tiny_model):
    (message,) = notices(tiny_model, prompt="background " * 8, max_sequence_length=32)
    assert message == "only T5 reads the whole prompt; CLIP stops before: `background`"


def test_a_long_rest_is_shortened(tiny_model):
    (message,) = notices(tiny_model, prompt="a cat " * 500)
    assert len(message) < 260


def test_an_unused_negative_prompt_is_told(tiny_model):
    assert notices(tiny_model, negative_prompt="a dog") == [
        "the negative prompt is not used: the true CFG scale is 1"
    ]


def test_a_length_beyond_the_models_own_is_told(tiny_model):
    facts = dataclasses.replace(tiny_model.facts, max_sequence_length=6)
    model = dataclasses.replace(tiny_model, facts=facts)
    assert notices(model) == ["8 text tokens are more than the model's own 6"]


def test_a_size_far_beyond_the_models_own_is_told(tiny_model):
    (message,) = notices(tiny_model, width=128, height=80, num_inference_steps=1)
    assert message.startswith("the model is made for 64 x 64 pixels; 128 x 80 may not show")


def test_guidance_that_schnell_does_not_embed_is_told(tiny_schnell):
    assert notices(tiny_schnell, distilled_guidance_scale=2.0) == [
        "this model has no guidance embedding: distilled guidance is not used"
    ]


def test_schnell_draws_without_notice(tiny_schnell):
    assert [type(event) for event in run(tiny_schnell)].count(ImageDone) == 1


def test_initial_latents_of_another_size_are_refused(tiny_model):
    events = generate_latents(tiny_model, REQUEST, initial_BLD=torch.zeros(1, 16, 64))
    with pytest.raises(ShapeError, match=r"\(1, 16, 64\) are not \(1, 20, 64\)"):
        next(events)


def test_the_noise_of_the_seed_as_initial_latents_changes_nothing(tiny_model):
    runs = [
        [
            e.tokens
            for e in generate_latents(tiny_model, REQUEST, initial_BLD=initial)
            if isinstance(e, LatentsDone)
        ]
        for initial in (None, pack(draw_noise([0], 64, 80)))
    ]
    assert torch.equal(runs[0][0], runs[1][0])


def test_a_hook_sees_every_step_and_may_replace_the_latents(tiny_model):
    seen = []

    def zero(step, sigma, latents):
        seen.append((step, sigma))
        return torch.zeros_like(latents) if step == 2 else None

    *_, done = generate_latents(tiny_model, REQUEST, on_step=zero)
    assert [step for step, _ in seen] == [0, 1, 2]
    assert seen[0][1] == 1.0
    assert not done.tokens.any()
