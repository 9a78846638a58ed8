"""Graphs that cannot be captured, at every moment at which that can show: the image comes."""

import weakref

import pytest
import torch
from fake_device import FakeDevice
from fake_graphs import fake_graphs
from managed_models import budgets, draw, unmanaged, wish

from flux_nf4.errors import FormatError
from flux_nf4.memory.contents import Contents
from flux_nf4.model.fast_step import fused_step
from flux_nf4.model.step_graph import StepGraph
from flux_nf4.pipeline import model_memory
from flux_nf4.pipeline.model_memory import ModelMemory

REQUEST = wish(num_inference_steps=5)
NOTICE = "steps run without CUDA graphs: CUDA error: operation not permitted"


def fused(model):
    """A model with the step that graphs are made of."""
    model.transformer.blocks.fast_step = fused_step
    return model


@pytest.fixture(scope="module")
def expected(folder):
    return draw(fused(unmanaged(folder)), REQUEST)[0]


@pytest.fixture
def refused(monkeypatch):
    """Let graphs be possible, and something about one of them go wrong."""

    def refused(action, number, message="CUDA error: operation not permitted\nmore"):
        def refuse(*event):
            if event == (action, number):
                raise RuntimeError(message)

        monkeypatch.setattr(StepGraph, "is_possible", lambda _device: True)
        return fake_graphs(monkeypatch, refuse=refuse)

    return refused


@pytest.mark.parametrize("share", [0, 2, 5], ids=["streamed", "mixed", "kept"])
@pytest.mark.parametrize("action", ["begin", "end", "replay"])
def test_the_image_comes_without_graphs(open_on, expected, refused, share, action):
    budget = budgets(open_on(FakeDevice()), REQUEST)[share]
    for number in (0,) if share == 5 else (0, 1, 4):
        refused(action, number)
        model = fused(open_on(FakeDevice(), budget))

        assert draw(model, REQUEST) == (expected, [NOTICE])
        assert draw(model, REQUEST) == (expected, [])  # and is not tried again


def test_another_size_tries_again(open_on, refused):
    log = refused("begin", 1)
    model = fused(open_on(FakeDevice(), budgets(open_on(FakeDevice()), REQUEST)[1]))
    draw(model, REQUEST)
    log.clear()
    draw(model, wish(num_inference_steps=5, width=80))

    assert any(entry.startswith("begin") for entry in log)


def test_memory_that_a_graph_lacks_takes_nothing_from_the_plan(open_on, expected, refused):
    refused("end", 1, "CUDA error: out of memory")
    model = fused(open_on(FakeDevice(), budgets(open_on(FakeDevice()), REQUEST)[0]))
    images, (notice,) = draw(model, REQUEST)

    assert images == expected
    assert notice == "steps run without CUDA graphs: CUDA error: out of memory"
    assert model.memory.num_shrinks == 0


def test_a_file_that_breaks_off_between_graphs_is_what_is_told(open_on, refused, monkeypatch):
    log = refused("none", 0)
    least = budgets(open_on(FakeDevice()), REQUEST)[0]
    model = fused(open_on(FakeDevice(), least, ram=0))
    fill = Contents.fill

    def broken(contents, buffer, threads):
        if "begin 3" in log:
            raise FormatError("cut short")
        fill(contents, buffer, threads)

    monkeypatch.setattr(Contents, "fill", broken)
    with pytest.raises(FormatError, match="cut short"):
        draw(model, REQUEST)


def test_graphs_are_gone_before_another_plan_is_made(open_on, monkeypatch):
    alive, graphs = [], []

    class Watched(StepGraph):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            graphs.append(weakref.ref(self))

    def refuse(action, number):
        if (action, number) == ("replay", 1) and "replay 1" in log and not alive:
            raise torch.OutOfMemoryError("full")

    def shrink(memory):
        alive.append([graph() for graph in graphs])
        return plain_shrink(memory)

    plain_shrink = ModelMemory.shrink
    monkeypatch.setattr(ModelMemory, "shrink", shrink)
    monkeypatch.setattr(model_memory, "StepGraph", Watched)
    monkeypatch.setattr(StepGraph, "is_possible", lambda _device: True)
    log = fake_graphs(monkeypatch, refuse=refuse)
    draw(fused(open_on(FakeDevice(), budgets(open_on(FakeDevice()), REQUEST)[0])), REQUEST)

    assert alive == [[None]]
