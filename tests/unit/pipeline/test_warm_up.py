"""What is begun before the first image: libraries that wake, and a drawing that nobody wants."""

import subprocess
import sys
import threading

import pytest
import torch

from flux_nf4.model.step_graph import LEAST_CALLS
from flux_nf4.nf4 import ops
from flux_nf4.pipeline import generate, warm_up
from flux_nf4.pipeline.events import ImageDone, StepDone


class Driver:
    """CUDA's driver, which notes what it is asked."""

    def __init__(self, failing=""):
        self.calls, self.failing = [], failing

    def __getattr__(self, name):
        def call(*arguments):
            index = arguments[-1] if name == "cuDeviceGet" else None
            self.calls.append((name, index))
            return int(name == self.failing)

        return call


@pytest.fixture
def wake(monkeypatch):
    """Wakes CUDA as on a machine that has it, with this driver, and waits until it has."""
    warm_up.wake_cuda.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def start(device, driver):
        monkeypatch.setattr(warm_up.ctypes, "CDLL", lambda name: driver)
        before = set(threading.enumerate())
        warm_up.wake_cuda(device)
        for thread in set(threading.enumerate()) - before:
            thread.join()
        return driver.calls

    yield start
    warm_up.wake_cuda.cache_clear()


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:3", 3)])
def test_cuda_starts_on_the_device_that_is_asked_for(wake, device, index):
    assert wake(device, Driver()) == [
        ("cuInit", None), ("cuDeviceGet", index), ("cuDevicePrimaryCtxRetain", None),
    ]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda:x", "xcuda"])
def test_no_other_device_starts_cuda(wake, device):
    assert wake(device, Driver()) == []


def test_cuda_starts_once(wake):
    driver = Driver()
    wake("auto", driver)
    assert wake("auto", driver) == wake("auto", driver)
    assert len(driver.calls) == 3


def test_a_machine_without_devices_is_left_alone(wake):
    assert wake("auto", Driver("cuInit")) == [("cuInit", None)]


def test_a_pytorch_without_cuda_starts_none(wake, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert wake("auto", Driver()) == []


@pytest.fixture
def complaints(monkeypatch):
    found = []
    monkeypatch.setattr(threading, "excepthook", found.append)
    return found


def test_a_machine_without_a_driver_disturbs_nobody(wake, monkeypatch, complaints):
    def fail(*_):
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(warm_up, "_start_cuda", fail)
    wake("auto", Driver())
    assert not complaints


@pytest.mark.parametrize("device", ["cpu", "cuda:99"])
def test_waking_libraries_disturbs_nobody(device, complaints):
    for thread in warm_up.wake_libraries(torch.device(device)):
        thread.join()
    assert not complaints


def test_waking_libraries_runs_a_kernel_and_a_convolution(monkeypatch):
    shapes = []
    monkeypatch.setattr(ops, "dequantize_4bit", lambda codes, absmax, *how: shapes.append(how[0]))
    convolve = torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional, "conv2d", lambda *given: shapes.append(convolve(*given).shape)
    )
    for thread in warm_up.wake_libraries(torch.device("cpu")):
        thread.join()

    assert sorted(map(tuple, shapes)) == [(1, 64), (8, 8, 6, 6)]


ENDING = """
import torch
from flux_nf4.nf4 import ops
from flux_nf4.pipeline.warm_up import wake_libraries

x = torch.ones(1500, 1500)
ops.dequantize_4bit = lambda *_: [x @ x for _ in range(6)]  # without Python's lock
wake_libraries(torch.device("cpu"))
raise SystemExit(3)
"""


def test_a_program_that_ends_meanwhile_ends_as_it_would():
    ended = subprocess.run(
        [sys.executable, "-c", ENDING], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (3, "")


def test_only_a_gpu_repays_a_warm_up():
    assert warm_up.repays(torch.device("cuda:1"))
    assert not warm_up.repays(torch.device("cpu"))


def test_a_warm_up_draws_one_image_of_the_models_own_size_with_enough_steps_for_a_graph(tiny_model):
    events = []
    warm_up.warm_up(tiny_model, on_event=events.append)

    (image,) = (event.image for event in events if isinstance(event, ImageDone))
    assert image.size == (tiny_model.facts.default_size,) * 2
    assert sum(isinstance(event, StepDone) for event in events) >= LEAST_CALLS


def test_a_warm_up_of_another_size_draws_that(tiny_model, monkeypatch):
    asked = []
    monkeypatch.setattr(generate, "generate", lambda model, request: asked.append(request) or ())
    warm_up.warm_up(tiny_model, size=(64, 80))

    assert (asked[0].width, asked[0].height) == (64, 80)
