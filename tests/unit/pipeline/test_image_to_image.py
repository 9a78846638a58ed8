"""Images and masks to start from: what is run, what is drawn anew, and what stays."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from flux_nf4.errors import Cancelled, InputError, NumericalError
from flux_nf4.pipeline.compat import FluxPipeline
from flux_nf4.pipeline.events import ImageDone, Notice, StageStarted, StepDone
from flux_nf4.pipeline.generate import LatentsDone, generate, generate_latents
from flux_nf4.pipeline.image_input import encode_source
from flux_nf4.pipeline.request import GenerationRequest

WIDTH, HEIGHT = 64, 80
random = np.random.default_rng(5)
PICTURE = Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
LEFT_HALF = Image.new("L", (WIDTH, HEIGHT))
LEFT_HALF.paste(255, (0, 0, WIDTH // 2, HEIGHT))
REQUEST = GenerationRequest(
    prompt="a red apple",
    width=WIDTH,
    height=HEIGHT,
    num_inference_steps=5,
    max_sequence_length=8,
    image=PICTURE,
)


def run(model, **changes):
    return list(generate(model, dataclasses.replace(REQUEST, **changes)))


def pictures(events):
    return [np.asarray(event.image) for event in events if isinstance(event, ImageDone)]


def source(model, **changes):
    request = dataclasses.replace(REQUEST, **changes)
    with torch.inference_mode():
        return encode_source(model, request.image, request)


def pixels(model, **changes):
    """The picture that the encoder sees, as 8-bit levels (H, W, 3)."""
    found = source(model, **changes).pixels[0].permute(1, 2, 0)
    return (found * 255).round().to(torch.uint8).numpy()


# ---- steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_inference_steps", "strength", "expected"),
    [
        (20, 0.6, 12),
        (20, 1, 20),
        (20, 0.55, 11),
        (20, 0.56, 12),
        (4, 0.1, 1),
        (1, 0.01, 1),
        (1000, 1e-30, 1),
    ],
)
def test_strength_is_the_share_of_steps_rounded_up(num_inference_steps, strength, expected):
    request = dataclasses.replace(
        REQUEST, num_inference_steps=num_inference_steps, strength=strength
    )
    assert request.num_steps == expected


def test_without_an_image_all_steps_are_run_whatever_the_strength():
    assert dataclasses.replace(REQUEST, image=None, strength=0.2).num_steps == 5


def test_the_image_is_encoded_first_and_only_some_steps_are_run(tiny_model):
    told = [
        event.stage if isinstance(event, StageStarted) else type(event).__name__
        for event in run(tiny_model, strength=0.4)
    ]
    steps = ["StepDone"] * 2
    assert told == ["encode", "text", "modulation", "denoise", *steps, "decode", "ImageDone"]


def test_steps_are_counted_among_those_that_are_run(tiny_model):
    events = run(tiny_model, strength=0.4, num_previews=1)
    steps = [(e.step, e.num_steps, e.preview is None) for e in events if isinstance(e, StepDone)]
    assert steps == [(1, 2, True), (2, 2, False)]


def test_cancelling_is_asked_before_the_image_is_encoded(tiny_model):
    events = generate(tiny_model, REQUEST, is_cancelled=lambda: True)
    assert next(events) == StageStarted(stage="encode")
    with pytest.raises(Cancelled):
        next(events)


# ---- what becomes of the image ------------------------------------------------------------------


def distance(one, other):
    return np.abs(np.subtract(one, other, dtype=np.float32)).mean()


def test_less_strength_stays_closer_to_the_image(tiny_model):
    latents = {}
    for strength in (0.2, 0.6, 1.0):
        request = dataclasses.replace(REQUEST, strength=strength)
        *_, done = generate_latents(tiny_model, request)
        latents[strength] = done.tokens.numpy()
    kept = source(tiny_model).mean.numpy()
    distances = [distance(each, kept) for each in latents.values()]
    assert distances == sorted(distances)
    assert distances[0] < distances[-1] / 2


def test_full_strength_leaves_nothing_of_the_image(tiny_model):
    black = Image.new("RGB", PICTURE.size)
    runs = [pictures(run(tiny_model, image=image, strength=1.0)) for image in (PICTURE, black)]
    assert np.array_equal(*runs)


def test_any_image_of_a_request_can_be_repeated_alone(tiny_model):
    together = pictures(run(tiny_model, seed=5, num_images=2))
    assert np.array_equal(together[1], pictures(run(tiny_model, seed=6))[0])


def test_a_batch_gives_the_images_of_single_runs(tiny_model):
    mask = {"mask_image": LEFT_HALF, "num_images": 3}
    together = pictures(run(tiny_model, batch_size=2, **mask))
    # A level of 255 may round the other way: sums run in another order in a batch.
    assert np.abs(np.subtract(together, pictures(run(tiny_model, **mask)), dtype=int)).max() <= 1


def test_the_image_is_encoded_once_for_all_images(tiny_model):
    events = run(tiny_model, num_images=3)
    assert sum(event == StageStarted(stage="encode") for event in events) == 1


def test_noise_of_ones_own_starts_from_the_images_mean(tiny_model):
    request = dataclasses.replace(REQUEST, strength=0.2)
    starts = []

    def look(step, sigma, latents):
        starts.append(latents)

    for noise in (None, source(tiny_model).mean * 0):
        list(
            generate_latents(
                tiny_model,
                request,
                initial_BLD=torch.zeros(1, 20, 64),
                image_noise_1LD=noise,
                on_step=look,
            )
        )
    assert torch.equal(*starts)


def test_nan_in_the_encoder_names_the_stage(tiny_model):
    weight = next(tiny_model.autoencoder.model.encoder.parameters())
    saved = weight.data.clone()
    weight.data.view(-1)[0] = torch.nan
    try:
        with pytest.raises(NumericalError, match="stage `encode`"):
            run(tiny_model)
    finally:
        weight.data.copy_(saved)


# ---- size and mode ------------------------------------------------------------------------------


def test_an_image_of_the_right_size_is_read_as_it_is(tiny_model):
    assert np.array_equal(pixels(tiny_model), np.asarray(PICTURE))


def test_a_wider_image_is_cropped_around_the_middle(tiny_model):
    wide = Image.new("RGB", (200, 80), "red")
    wide.paste((0, 0, 255), (68, 0, 132, 80))
    assert (pixels(tiny_model, image=wide) == (0, 0, 255)).all()


def test_transparency_becomes_white(tiny_model):
    clear = Image.new("RGBA", (64, 80), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 32, 80))
    seen = pixels(tiny_model, image=clear)
    assert (seen[:, :32] == (0, 0, 255)).all()
    assert (seen[:, 32:] == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBa", "CMYK", "YCbCr", "F"])
def test_grey_is_grey_in_any_mode(tiny_model, mode):
    image = Image.new("L", (64, 80), 255).convert("RGB").convert(mode if mode != "RGBa" else "RGBA")
    assert (pixels(tiny_model, image=image.convert(mode)) == 255).all()


def test_sixteen_bits_become_eight(tiny_model):
    image = Image.fromarray(np.full((80, 64), 32768, dtype=np.uint16))
    assert (pixels(tiny_model, image=image) == 128).all()


def turned(image):
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    return image


def test_an_image_on_its_side_is_turned_upright(tiny_model):
    on_its_side = turned(PICTURE.transpose(Image.Transpose.ROTATE_90))
    assert np.array_equal(pixels(tiny_model, image=on_its_side), np.asarray(PICTURE))


# ---- masks --------------------------------------------------------------------------------------


def test_pixels_outside_the_mask_stay_exactly(tiny_model):
    (picture,) = pictures(run(tiny_model, mask_image=LEFT_HALF, strength=1.0))
    assert np.array_equal(picture[:, 32:], np.asarray(PICTURE)[:, 32:])
    assert distance(picture[:, :32], np.asarray(PICTURE)[:, :32]) > 10


def test_latents_outside_the_mask_are_those_of_the_image(tiny_model):
    request = dataclasses.replace(REQUEST, mask_image=LEFT_HALF)
    *_, done = generate_latents(tiny_model, request, initial_BLD=torch.randn(1, 20, 64))
    assert isinstance(done, LatentsDone)
    differs = (done.tokens != done.source.mean).any(-1).view(5, 4)  # tokens of 16 x 16 pixels
    assert differs.tolist() == [[True, True, False, False]] * 5


def test_a_white_mask_draws_all_anew_as_no_mask_does(tiny_model):
    white = Image.new("1", (64, 80), 1)
    assert np.array_equal(pictures(run(tiny_model, mask_image=white)), pictures(run(tiny_model)))


def test_a_black_mask_gives_the_image_back_and_says_so(tiny_model):
    events = run(tiny_model, mask_image=Image.new("L", (64, 80)))
    (message,) = [event.message for event in events if isinstance(event, Notice)]
    assert message.startswith("the mask has no white")
    assert np.array_equal(pictures(events)[0], np.asarray(PICTURE))


@pytest.mark.parametrize(("level", "is_white"), [(127, 0), (128, 1)])
def test_a_mask_has_two_levels(tiny_model, level, is_white):
    found = source(tiny_model, mask_image=Image.new("L", (64, 80), level))
    assert found.pixel_mask.unique().tolist() == found.latent_mask.unique().tolist() == [is_white]


@pytest.mark.parametrize(("level", "is_white"), [(0x7FFF, 0), (0x8000, 1)])
def test_a_mask_of_sixteen_bits_has_two_levels(tiny_model, level, is_white):
    mask = Image.fromarray(np.full((80, 64), level, dtype=np.uint16))
    assert source(tiny_model, mask_image=mask).latent_mask.unique().tolist() == [is_white]


def test_the_transparency_of_a_mask_says_nothing(tiny_model):
    clear = Image.new("RGBA", (64, 80), (255, 255, 255, 0))
    palette = Image.new("P", (64, 80))
    palette.putpalette([255, 255, 255])
    palette.info["transparency"] = b"\0"
    for mask in (clear, palette):
        assert source(tiny_model, mask_image=mask).latent_mask.all()


def test_a_mask_follows_its_image_through_scaling_cropping_and_turning(tiny_model):
    image, mask = Image.new("RGB", (160, 80), "blue"), Image.new("L", (80, 40))
    image.paste((255, 0, 0), (80, 0, 160, 80))
    mask.paste(255, (40, 0, 80, 40))
    sideways = turned(mask.transpose(Image.Transpose.ROTATE_90))
    found = source(tiny_model, image=image, mask_image=sideways)
    is_red = found.pixels[:, :1] > 0.5
    assert torch.equal(found.pixel_mask.bool(), is_red)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(InputError, match="64 x 64 pixels does not lie on the image of 64 x 80"):
        dataclasses.replace(REQUEST, mask_image=Image.new("L", (64, 64)))


def test_a_preview_shows_the_image_outside_the_mask(tiny_model):
    events = run(tiny_model, mask_image=LEFT_HALF, num_previews=5)
    shown = [np.asarray(e.preview)[:, 48:] for e in events if isinstance(e, StepDone)]
    assert distance(shown[0], shown[-1]) < 2


# ---- requests and calls -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"strength": 0}, "`strength` must be more than 0"),
        ({"strength": 1.01}, "`strength` must be a number from 0 to 1"),
        ({"strength": float("nan")}, "`strength`"),
        ({"strength": "0.5"}, "`strength`"),
        ({"image": None, "mask_image": LEFT_HALF}, "`mask_image` needs an `image`"),
        ({"image": "cat.png"}, "`image` must be a PIL.Image.Image, got `str`"),
        ({"mask_image": np.zeros((80, 64))}, "`mask_image` must be a PIL.Image.Image"),
        ({"image": Image.new("RGB", (0, 5))}, "`image` of 0 x 5 has no pixels"),
        ({"mask_image": Image.new("L", (5, 0))}, "`mask_image` of 5 x 0 has no pixels"),
        ({"num_previews": -1}, "`num_previews`"),
        ({"num_previews": True}, "`num_previews`"),
    ],
)
def test_a_wrong_value_has_its_own_message(changes, reason):
    with pytest.raises(InputError, match=reason):
        dataclasses.replace(REQUEST, **changes)


CALL = {"num_inference_steps": 2, "max_sequence_length": 8, "seed": 3}


@pytest.mark.parametrize(
    ("image_size", "given", "expected"),
    [
        ((50, 70), {}, (64, 64)),
        ((128, 64), {}, (96, 64)),
        ((64, 256), {}, (64, 128)),
        ((640, 320), {"width": 128}, (128, 64)),
        ((320, 640), {"height": 128}, (64, 128)),
        ((640, 320), {"width": 64, "height": 80}, (64, 80)),
    ],
)
def test_an_image_has_a_say_in_the_size(tiny_model, image_size, given, expected):
    image = Image.new("RGB", image_size, "red")
    drawn = FluxPipeline(tiny_model)("a cat", image=image, **CALL, **given).images[0]
    assert drawn.size == expected


def test_an_image_on_its_side_has_its_upright_size(tiny_model):
    image = turned(Image.new("RGB", (128, 64)))
    assert FluxPipeline(tiny_model)("a cat", image=image, **CALL).images[0].size == (64, 96)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"image": PICTURE, "latents": torch.zeros(1, 20, 64)}, "both say where to start"),
        ({"image": [PICTURE]}, "`image` must be a PIL.Image.Image"),
        ({"image": Image.new("RGB", (0, 5))}, "no pixels"),
        ({"image": PICTURE, "width": "64"}, "width must be a whole number"),
        ({"image": PICTURE, "height": 100}, "96 or 112"),
        ({"mask_image": LEFT_HALF}, "needs an `image`"),
    ],
)
def test_a_wrong_argument_has_its_own_message(tiny_model, arguments, reason):
    with pytest.raises(InputError, match=reason):
        FluxPipeline(tiny_model)("a cat", **CALL, **arguments)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_pixels_outside_the_mask_stay_in_every_output_type(tiny_model, output_type):
    drawn = FluxPipeline(tiny_model)(
        "a cat",
        image=PICTURE,
        mask_image=LEFT_HALF,
        width=WIDTH,
        height=HEIGHT,
        output_type=output_type,
        **CALL,
    ).images[0]
    levels = np.asarray(drawn.permute(1, 2, 0) if output_type == "pt" else drawn)
    if output_type != "pil":
        levels = np.round(levels * 255)
    assert np.array_equal(levels[:, 32:], np.asarray(PICTURE)[:, 32:])
