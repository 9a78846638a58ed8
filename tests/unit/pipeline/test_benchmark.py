"""What is measured, on the CPU: the arithmetic of times, and one drawing from end to end."""

import pytest
import torch

from flux_nf4.pipeline.benchmark import measure_drawing, num_requests, spread
from flux_nf4.pipeline.ceilings import timed_calls
from flux_nf4.pipeline.load import LoadSettings, assemble_model
from flux_nf4.pipeline.random_model import random_checkpoint

STEPS = 3


@pytest.fixture(scope="module")
def measured():
    model = assemble_model(random_checkpoint("tiny"), LoadSettings(device="cpu"))
    return measure_drawing(model, size=(64, 64), num_steps=STEPS)


def test_percentiles_lie_between_neighbours():
    found = spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])

    assert (found.p20, found.median, found.p80, found.count) == (2.0, 3.5, 5.0, 6)


def test_one_time_is_its_own_percentiles():
    found = spread([2.0])

    assert (found.p20, found.median, found.p80, found.count) == (2.0, 2.0, 2.0, 1)


@pytest.mark.parametrize(("num_steps", "expected"), [(1, 6), (4, 6), (20, 3), (28, 2), (1000, 2)])
def test_requests_are_as_many_as_steps_need(num_steps, expected):
    assert num_requests(num_steps) == expected


def test_a_call_is_timed_three_times_at_least():
    seconds = timed_calls(lambda: None, torch.device("cpu"), budget_s=0)

    assert len(seconds) == 3


def test_the_first_step_of_an_image_is_not_counted(measured):
    assert measured.step.count == (num_requests(STEPS) - 1) * (STEPS - 1)


def test_every_stage_up_to_the_png_is_timed(measured):
    stages = {"prepare", "text", "modulation", "denoise", "decode", "png"}

    assert set(measured.warm.stages_s) == stages


def test_the_stages_add_up_to_the_whole(measured):
    drawn = measured.warm

    assert sum(drawn.stages_s.values()) == pytest.approx(drawn.total_s, rel=0.05, abs=0.01)


def test_the_steps_are_within_the_denoise_stage(measured):
    assert sum(measured.warm.steps_s) <= measured.warm.stages_s["denoise"]


def test_no_device_memory_is_claimed_on_a_cpu(measured):
    assert measured.warm.peaks == {}


def test_the_share_is_of_products_and_attention(measured):
    assert measured.share == measured.ceilings.step_s / measured.step.median
