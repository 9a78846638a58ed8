"""Memory that runs out, at every moment at which it can: the image comes all the same."""

import pytest
import torch
from fake_device import Counting, FakeDevice
from managed_models import PLENTY, budgets, draw, unmanaged, wish

from flux_nf4 import FluxPipeline
from flux_nf4.errors import DoesNotFitError

CALL = {"width": 128, "height": 128, "num_inference_steps": 1, "max_sequence_length": 8}
NOTICE = "the device ran out of memory: going on within "


@pytest.fixture(scope="module")
def expected(folder):
    return draw(unmanaged(folder), wish())[0]


class Buffers(FakeDevice):
    """Counts only what is allocated as a buffer."""

    def allocate(self, num_bytes):
        self.is_buffer = True
        try:
            return super().allocate(num_bytes)
        finally:
            self.is_buffer = False

    def count(self, tensor):
        if self.is_buffer:
            super().count(tensor)


def num_allocations(open_on, kind, budget):
    device = kind()
    draw(open_on(device, budget), wish())
    return device.num_allocations


@pytest.mark.parametrize("share", [0, 2, 5], ids=["streamed", "mixed", "kept"])
def test_whichever_buffer_finds_no_room_the_image_comes(open_on, expected, share):
    budget = budgets(open_on(FakeDevice()), wish())[share]
    fixed = 1  # the first is what is on the device at all times: without it nothing can be done
    for number in range(fixed, num_allocations(open_on, Buffers, budget)):
        device = Buffers(failing=[number])
        model = open_on(device, budget)
        images, notices = draw(model, wish())

        assert images == expected
        (said,) = (*notices, *model.notes)
        assert said.startswith(NOTICE)


@pytest.mark.parametrize("share", [0, 5], ids=["streamed", "kept"])
def test_whatever_computation_finds_no_room_the_image_comes(open_on, expected, share):
    budget = budgets(open_on(FakeDevice()), wish())[share]
    total = num_allocations(open_on, FakeDevice, budget)
    # Every stage has hundreds of them: a few of each, in steps that hit others in every pass.
    for number in range(5, total, total // 13):
        images, notices = draw(open_on(FakeDevice(failing=[number]), budget), wish())

        assert images == expected
        assert all(notice.startswith(NOTICE) for notice in notices)


class Library(FakeDevice):
    """What runs out of memory is a library, which has its own words for it."""

    def count(self, tensor):
        try:
            super().count(tensor)
        except torch.OutOfMemoryError:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED") from None


def test_where_a_library_finds_no_room_the_image_comes(open_on, expected):
    budget = budgets(open_on(FakeDevice()), wish())[2]
    total = num_allocations(open_on, FakeDevice, budget)
    for number in range(5, total, total // 7):
        images, notices = draw(open_on(Library(failing=[number]), budget), wish())

        assert images == expected
        assert all(notice.startswith(NOTICE) for notice in notices)


def test_memory_that_another_program_takes_is_given_up(open_on, expected):
    tried = budgets(open_on(FakeDevice()), wish())
    frugal = FakeDevice()
    draw(open_on(frugal, tried[0]), wish())
    device = FakeDevice()
    model = open_on(device, tried[-1])
    draw(model, wish("a dog"))
    kept = model.memory.plan
    device.limit = max(device.peak * 3 // 4, frugal.peak * 6 // 5)
    assert device.limit < device.peak
    images, notices = draw(model, wish())

    assert images == expected
    assert [notice.startswith(NOTICE) for notice in notices] == [True] * len(notices) != []
    assert model.memory.plan.peak_bytes < kept.peak_bytes
    assert draw(model, wish()) == (expected, [])  # and what was learnt stays


def test_a_larger_image_is_planned_within_what_was_set_once_memory_is_free_again(open_on):
    frugal, large = FakeDevice(), wish(width=512, height=512)
    draw(open_on(frugal, budgets(open_on(FakeDevice()), wish())[0]), wish())
    device = FakeDevice()
    model = open_on(device, PLENTY)
    images = draw(model, large)[0]
    draw(model, wish())
    device.limit = max(device.alive // 2, frugal.peak * 6 // 5)
    assert draw(model, wish())[1]
    device.limit = None

    assert draw(model, large)[0] == images


def test_pictures_that_are_done_take_no_memory_of_the_device(open_on):
    """The plan knows of one image. This device counts pictures as well, a byte for each value."""
    peaks = []
    for num_images in (1, 65):
        device = FakeDevice()
        pipeline = FluxPipeline(open_on(device, PLENTY))
        with Counting(device):
            found = pipeline("a cat", num_images_per_prompt=num_images, **CALL)
        assert len(found.images) == num_images
        peaks.append(device.peak)
    assert peaks[1] <= peaks[0] + 64 * (3 * 128 * 128)


def test_images_at_once_become_fewer_where_they_do_not_fit(open_on):
    alone, four = (
        wish(width=384, height=384),
        wish(width=384, height=384, num_images=4, batch_size=4),
    )
    device = FakeDevice()
    draw(open_on(device, budgets(open_on(FakeDevice()), alone)[0]), alone)
    enough_for_one = int(1.2 * device.peak)
    device = FakeDevice()
    model = open_on(device)
    device.limit = enough_for_one
    images, notices = draw(model, four)

    assert notices
    assert model.memory.batch_size < 4
    assert len(images) == 4


def test_where_nothing_is_left_it_is_said(open_on):
    budget = budgets(open_on(FakeDevice()), wish())[0]
    device = FakeDevice()
    model = open_on(device, budget)
    device.limit = device.alive + 10_000

    with pytest.raises(DoesNotFitError, match=r"ran out of memory within .* at 64 x 64"):
        draw(model, wish())


def test_a_budget_that_no_plan_fits_is_refused_with_what_would(open_on):
    budget = budgets(open_on(FakeDevice()), wish())[0]

    with pytest.raises(DoesNotFitError, match="needs 616 MiB") as raised:
        draw(open_on(FakeDevice(), budget - 2**20), wish())
    assert raised.value.hint.startswith("allow 616MiB")


def test_a_device_that_others_have_filled_has_a_budget_of_nothing(open_on, monkeypatch):
    monkeypatch.setattr(FakeDevice, "free_bytes", lambda _self: 2**20)

    with pytest.raises(DoesNotFitError, match="the budget is 0 MiB"):
        draw(open_on(FakeDevice(), None), wish())


def test_a_device_without_room_for_what_is_always_there_is_refused(open_on):
    with pytest.raises(DoesNotFitError, match="no room for"):
        open_on(FakeDevice(limit=1000))


def test_a_peak_above_the_plan_is_told(open_on, monkeypatch):
    model = open_on(FakeDevice(), budgets(open_on(FakeDevice()), wish())[0])
    monkeypatch.setattr(FakeDevice, "peak_bytes", lambda _self: 2**30)
    _, notices = draw(model, wish())

    assert notices == ["device memory peaked at 1.00 GiB, and 0.10 GiB was planned"]
