"""Plans carried out on a device that counts bytes, copies late and is full of rubbish."""

import gc
import weakref

import pytest
import torch
from fake_device import FakeDevice
from managed_models import budgets, draw, unmanaged, wish
from tolerances import COUNTED_HOST_BYTES

from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.memory.budget import SLACK_BYTES
from flux_nf4.memory.residency import slots_in_turn
from flux_nf4.pipeline import load
from flux_nf4.pipeline.generate import generate
from flux_nf4.pipeline.load import LoadSettings, assemble_model

REQUESTS = {"plain": wish(), "guided": wish(guidance_scale=2.0, negative_prompt="dog")}


@pytest.fixture(scope="module")
def expected(folder):
    """What a model draws that nobody manages."""
    model = unmanaged(folder)
    return {name: draw(model, request)[0] for name, request in REQUESTS.items()}


def planned(plan, *names):
    return sum(phase.moved_bytes for phase in plan.phases if phase.name in names)


def test_a_model_that_nobody_manages_is_where_it_computes(folder, expected, monkeypatch):
    monkeypatch.setattr(load, "managed_device", lambda *_: FakeDevice())
    settings = LoadSettings(device="cpu", dtype=torch.float32)
    model = assemble_model(open_checkpoint(folder), settings, is_managed=False)

    assert not any(weight.is_meta for weight in model.transformer.parameters())
    assert draw(model, REQUESTS["plain"])[0] == expected["plain"]


@pytest.mark.parametrize("is_lazy", [True, False], ids=["late copies", "early copies"])
@pytest.mark.parametrize("name", REQUESTS)
def test_under_every_budget_the_image_is_the_same(open_on, expected, name, is_lazy):
    request, rings = REQUESTS[name], []
    for budget in budgets(open_on(FakeDevice()), request):
        model = open_on(FakeDevice(is_lazy=is_lazy), budget)
        assert draw(model, request) == (expected[name], [])
        rings += [phase.ring.num_slots for phase in model.memory.plan.phases]

    assert {0, 1, 2, 3} <= set(rings)


def test_no_moment_takes_more_than_was_planned(open_on):
    for budget in budgets(open_on(FakeDevice()), wish()):
        device = FakeDevice()
        model = open_on(device, budget)
        draw(model, wish())

        plan = model.memory.plan
        planned_bytes = plan.peak_bytes - plan.budget.context_bytes - SLACK_BYTES
        assert device.peak <= planned_bytes + COUNTED_HOST_BYTES


def test_another_image_moves_what_was_planned(open_on):
    for budget in budgets(open_on(FakeDevice()), wish()):
        model = open_on(FakeDevice(), budget)
        draw(model, wish())
        before = model.memory.residency.moved_bytes
        draw(model, wish("a dog"))

        moved_bytes = model.memory.residency.moved_bytes - before
        assert moved_bytes == planned(model.memory.plan, "text", "modulation", "denoise", "decode")


def test_the_same_prompt_never_loads_the_text_encoders_twice(open_on):
    model = open_on(FakeDevice(), budgets(open_on(FakeDevice()), wish())[0])
    draw(model, wish())
    before = model.memory.residency.moved_bytes
    draw(model, wish(seed=4))

    moved_bytes = model.memory.residency.moved_bytes - before
    assert planned(model.memory.plan, "text") > 0
    assert moved_bytes == planned(model.memory.plan, "modulation", "denoise", "decode")


def test_only_the_last_prompts_are_remembered(open_on):
    texts = open_on(FakeDevice()).memory.texts
    for number in range(40):
        texts.get((number,), list)

    assert texts.get((39,), lambda: ["anew"]) == []
    assert texts.get((0,), lambda: ["anew"]) == ["anew"]


def test_where_main_memory_is_little_weights_come_from_the_file(open_on, expected):
    least = budgets(open_on(FakeDevice()), wish())[0]
    model = open_on(FakeDevice(), least, ram=0)

    assert draw(model, wish())[0] == expected["plain"]
    assert model.memory.plan.bytes_in("pinned", "pageable") == 0


def test_weights_in_pageable_memory_pass_through_staging(open_on, expected, monkeypatch):
    least = budgets(open_on(FakeDevice()), wish())[0]
    model = open_on(FakeDevice(), least)
    draw(model, wish("a dog"))
    pageable = dict.fromkeys((each.unit.name for each in model.memory.plan.placements), "pageable")
    residency = model.memory.residency
    settle = residency._mover.settle
    monkeypatch.setattr(residency._mover, "settle", lambda homes: settle(homes | pageable))
    residency.forget()

    assert draw(model, wish())[0] == expected["plain"]


@pytest.mark.parametrize("share", [0, 2])
def test_quantised_weights_are_streamed_as_they_are(open_on, share):
    request = wish("a red apple", max_sequence_length=None)
    plain = unmanaged(None)
    budget = budgets(open_on(FakeDevice(), path=None), request)[share]
    model = open_on(FakeDevice(), budget, path=None)

    assert draw(model, request)[0] == draw(plain, request)[0]


def test_previews_come_where_the_autoencoder_is_streamed(open_on):
    request = wish(num_previews=2)
    model = open_on(FakeDevice(), budgets(open_on(FakeDevice()), request)[0])
    previews = [event.preview for event in generate(model, request) if hasattr(event, "preview")]

    assert len(previews) == 2
    assert None not in previews


def test_an_image_that_is_given_up_leaves_nothing_behind(open_on, expected):
    device = FakeDevice()
    model = open_on(device, budgets(open_on(FakeDevice()), wish())[0])
    draw(model, wish())
    held = device.alive
    events = generate(model, wish())
    for event in events:
        if type(event).__name__ == "StepDone":
            break
    events.close()
    gc.collect()

    assert device.alive == held
    assert draw(model, wish())[0] == expected["plain"]


def test_a_model_that_is_dropped_frees_the_device(open_on):
    device = FakeDevice()
    model = open_on(device)
    mover = weakref.ref(model.memory.residency._mover)
    draw(model, wish())
    gc.collect()
    gc.disable()  # it goes at once, not when Python looks for what refers to itself
    try:
        del model
        assert mover() is None
        assert device.alive == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("num_slots", range(1, 7))
def test_slots_take_turns_in_every_pass_and_into_the_next(num_slots):
    for num_units in range(1, 80):
        slots = slots_in_turn(num_units, num_slots)
        assert len(slots) == num_units
        assert set(slots) <= set(range(num_slots))
        if num_units >= num_slots * num_slots:
            twice = slots + slots
            for i in range(num_units):
                window = twice[i : i + max(1, num_slots - 1)]
                assert len(set(window)) == len(window)
