"""Weights that do not arrive: who waits is told, and the next image is right."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_device import FakeDevice
from managed_models import budgets, draw, unmanaged, wish

from flux_nf4 import FluxPipeline
from flux_nf4.errors import FormatError, InputError
from flux_nf4.memory.contents import Contents
from flux_nf4.pipeline.events import StepDone
from flux_nf4.pipeline.generate import generate

PATIENCE_S = 60
CALL = {"width": 64, "height": 64, "num_inference_steps": 2, "max_sequence_length": 8}


@pytest.fixture(scope="module")
def expected(folder):
    return draw(unmanaged(folder), wish())[0]


@pytest.fixture
def errors(monkeypatch):
    """What a unit's values meet with on their way to main memory, by its contents' `id`."""
    fill, errors = Contents.fill, {}

    def failing(contents, buffer, threads):
        if id(contents) in errors:
            raise errors[id(contents)]
        fill(contents, buffer, threads)

    monkeypatch.setattr(Contents, "fill", failing)
    return errors


def contents_of(model, unit):
    residency = model.memory.residency
    residency.forget()
    residency._mover._host.clear()
    return id(residency._contents[unit])


@pytest.mark.parametrize("share", [0, 5], ids=["streamed", "kept"])
def test_after_a_file_that_could_not_be_read_the_next_image_is_right(
    open_on, expected, errors, share
):
    model = open_on(FakeDevice(), budgets(open_on(FakeDevice()), wish())[share])
    errors[contents_of(model, "blocks.double.1")] = FormatError("cannot be read")
    with pytest.raises(FormatError, match="cannot be read"):
        draw(model, wish())

    errors.clear()
    assert draw(model, wish()) == (expected, [])


def test_what_every_phase_uses_is_read_again_where_it_did_not_arrive(
    open_on, expected, monkeypatch
):
    budget = budgets(open_on(FakeDevice()), wish())[0]
    fill, failing = Contents.fill, [True]

    def failing_fill(contents, buffer, threads):
        if failing and any(place.entry_name == "img_in.weight" for place in contents.places):
            raise FormatError("cannot be read")
        fill(contents, buffer, threads)

    monkeypatch.setattr(Contents, "fill", failing_fill)
    model = open_on(FakeDevice(), budget)
    with pytest.raises(FormatError, match="cannot be read"):
        draw(model, wish())

    failing.clear()
    assert draw(model, wish()) == (expected, [])


ENDING = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from fake_device import FakeDevice
from flux_nf4.pipeline import load

class Slow(FakeDevice):
    def copy(self, target, source, *, after):
        x = torch.ones(1500, 1500)
        for _ in range(4):
            x @ x  # without Python's lock
        return super().copy(target, source, after=after)

load.managed_device = lambda *_: Slow()
model = load.load_model(sys.argv[2], load.LoadSettings(device="cpu", vram=2**40))
raise SystemExit(3)
"""


def test_a_program_that_ends_while_weights_arrive_ends_as_it_would(folder):
    tests = str(Path(__file__).parents[2])
    ended = subprocess.run(
        [sys.executable, "-c", ENDING, tests, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert (ended.returncode, ended.stderr) == (3, "")


def test_an_error_that_nobody_foresaw_reaches_who_waits(open_on, errors):
    model = open_on(FakeDevice(), budgets(open_on(FakeDevice()), wish())[0])
    errors[contents_of(model, "blocks.double.1")] = KeyError("unforeseen")
    raised = []

    def wait():
        try:
            draw(model, wish())
        except KeyError as error:
            raised.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)

    assert [str(error) for error in raised] == ["'unforeseen'"]


def test_a_wait_that_is_interrupted_leaves_no_copy_behind(open_on, expected, monkeypatch):
    device = FakeDevice()
    model = open_on(device, budgets(open_on(FakeDevice()), wish())[0])
    draw(model, wish())
    need, asked = model.memory.residency.device.wait, []

    def interrupted(mark):
        asked.append(mark)
        if len(asked) == 5:
            raise KeyboardInterrupt
        need(mark)

    with monkeypatch.context() as patch:
        patch.setattr(device, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            draw(model, wish())
    assert all(copy.is_done for copy in device._copies)
    assert draw(model, wish())[0] == expected


def test_two_requests_at_once_are_refused_and_the_first_is_right(open_on, expected):
    model = open_on(FakeDevice(), budgets(open_on(FakeDevice()), wish())[0])
    events = generate(model, wish())
    while not isinstance(next(events), StepDone):
        pass

    with pytest.raises(InputError, match="is drawing already"):
        draw(model, wish("a dog"))
    (done,) = (event for event in events if hasattr(event, "image"))
    assert [done.image.tobytes()] == expected


def call_pipeline(model, request):
    return FluxPipeline(model)(request.prompt, **CALL)


@pytest.mark.parametrize("call", [draw, call_pipeline])
def test_an_error_that_is_still_looked_at_does_not_hold_the_model(open_on, monkeypatch, call):
    model = open_on(FakeDevice(), budgets(open_on(FakeDevice()), wish())[5])
    with monkeypatch.context() as patch:
        patch.setattr(model.autoencoder, "decode", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError) as raised:
            call(model, wish())

    call(model, wish())
    assert raised.value.__traceback__ is not None


def test_a_request_that_was_closed_makes_room_for_the_next(open_on, expected):
    model = open_on(FakeDevice(), budgets(open_on(FakeDevice()), wish())[0])
    events = generate(model, wish("a dog"))
    while not isinstance(next(events), StepDone):
        pass
    events.close()

    assert draw(model, wish())[0] == expected
