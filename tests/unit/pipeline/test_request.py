import dataclasses
import math

import pytest

from flux_nf4.errors import InputError
from flux_nf4.pipeline.request import MAX_PROMPT_CHARACTERS, GenerationRequest


def request(**changes):
    return GenerationRequest(**{"prompt": "a cat", "width": 256, "height": 256} | changes)


def test_the_defaults_are_one_image_without_true_guidance():
    assert request().seeds == (0,)
    assert not request().is_guided


def test_images_count_their_seeds_up():
    assert request(seed=41, num_images=3).seeds == (41, 42, 43)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_inference_steps", 0),
        ("num_inference_steps", 1001),
        ("num_inference_steps", 20.0),
        ("num_inference_steps", "20"),
        ("num_inference_steps", True),
        ("distilled_guidance_scale", math.nan),
        ("distilled_guidance_scale", math.inf),
        ("distilled_guidance_scale", -0.5),
        ("distilled_guidance_scale", "3.5"),
        ("guidance_scale", 0.0),
        ("guidance_scale", 101),
        ("guidance_scale", 10**400),
        ("guidance_scale", None),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.5),
        ("num_images", 0),
        ("batch_size", 65),
        ("max_sequence_length", 1),
        ("max_sequence_length", 513),
        ("schedule", "karras"),
        ("prompt", None),
        ("prompt", b"a cat"),
        ("negative_prompt", 3),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_name(name, value):
    with pytest.raises(InputError, match=f"`{name}`"):
        request(**{name: value})


def test_a_size_is_refused_with_its_neighbours():
    with pytest.raises(InputError, match="496 or 512"):
        request(width=500)


def test_the_last_seed_leaves_no_second_image():
    with pytest.raises(InputError, match="leaves no seeds for 2 images"):
        request(seed=2**64 - 1, num_images=2)


def test_a_prompt_beyond_all_measure_is_refused():
    with pytest.raises(InputError, match="100001 characters"):
        request(prompt="x" * (MAX_PROMPT_CHARACTERS + 1))


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(InputError, match="not valid Unicode"):
        request(prompt="a \ud83d cat")


def test_a_request_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        request().seed = 3
