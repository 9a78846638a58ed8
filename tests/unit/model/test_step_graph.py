"""Which graphs a step becomes, in which order they and the hooks of blocks run; without a GPU."""

import contextlib
from dataclasses import replace

import pytest
import torch

from flux_nf4.model import step_graph
from flux_nf4.model.build import build_transformer
from flux_nf4.model.config import tiny
from flux_nf4.model.fast_step import fused_step
from flux_nf4.model.rope import rope_table
from flux_nf4.model.step_graph import StepGraph


class FakeStream:
    def wait_stream(self, _other):
        pass


@pytest.fixture
def log(monkeypatch):
    """What was done: `begin`, `end` and `replay` of graphs by their number, hooks by name."""
    done, graphs = [], []

    class FakeGraph:
        def __init__(self):
            graphs.append(self)
            self.number = len(graphs) - 1

        def capture_begin(self, **_options):
            done.append(f"begin {self.number}")

        def capture_end(self):
            done.append(f"end {self.number}")

        def replay(self):
            done.append(f"replay {self.number}")

    cuda = step_graph.torch.cuda
    monkeypatch.setattr(cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(cuda, "current_stream", lambda _device: FakeStream())
    monkeypatch.setattr(cuda, "stream", lambda _stream: contextlib.nullcontext())
    monkeypatch.setattr(step_graph, "_side_stream", lambda _device: FakeStream())
    return done


@pytest.fixture
def blocks(make_transformer):
    component = make_transformer(replace(tiny(), num_double_blocks=1, num_single_blocks=4))
    blocks = build_transformer(component, device="cpu", dtype=torch.float32).blocks
    blocks.fast_step = fused_step
    return blocks


def inputs(config, *, batch=1):
    img = torch.randn(batch, 6, config.in_channels)
    txt = torch.randn(batch, 3, config.context_dim)
    row = torch.randn(1, config.modulation_width)
    return img, txt, row, rope_table(3, 2, 3, config)


def watch(blocks, log):
    for i, block in enumerate(blocks.single_blocks):
        block.register_forward_pre_hook(lambda *_, i=i: log.append(f"hook {i}"))


@torch.no_grad()
def test_a_step_whose_weights_stay_is_one_graph(blocks, log):
    watch(blocks, log)
    graph, given = StepGraph(blocks, torch.device("cpu")), inputs(blocks.config)
    expected = blocks(*given)
    log.clear()

    assert torch.equal(graph(*given), expected)
    assert log == [f"hook {i}" for i in range(4)]
    log.clear()
    assert torch.equal(graph(*given), expected)
    assert log == ["begin 0", "end 0", "replay 0"]
    log.clear()
    graph(*given)
    assert log == ["replay 0"]


@torch.no_grad()
def test_weights_that_move_are_seen_to_between_two_graphs(blocks, log):
    watch(blocks, log)
    moving = set(list(blocks.single_blocks)[1:3])
    graph = StepGraph(blocks, torch.device("cpu"), moving.__contains__)
    given = inputs(blocks.config)
    expected = graph(*given)
    log.clear()

    assert torch.equal(graph(*given), expected)
    # The block after the last that moves counts as well: it lets go of that one's slot.
    captured = ["begin 0", "end 0", "replay 0"]
    for i in (1, 2, 3):
        captured += [f"hook {i}", f"begin {i}", f"end {i}", f"replay {i}"]
    assert log == captured
    log.clear()
    graph(*given)
    assert log == ["replay 0", "hook 1", "replay 1", "hook 2", "replay 2", "hook 3", "replay 3"]


@torch.no_grad()
def test_calls_of_another_shape_run_as_they_are(blocks, log):
    graph = StepGraph(blocks, torch.device("cpu"))
    for _ in range(2):
        graph(*inputs(blocks.config))
    log.clear()
    given = inputs(blocks.config, batch=2)
    assert torch.equal(graph(*given), blocks(*given))
    assert log == []


@torch.no_grad()
def test_without_memory_for_a_graph_steps_run_as_they_are(blocks, log, monkeypatch):
    graph, given = StepGraph(blocks, torch.device("cpu")), inputs(blocks.config)
    expected = graph(*given)
    step = blocks.fast_step

    def full(*arguments):
        if log and log[-1].startswith("begin"):
            raise torch.OutOfMemoryError("full")
        return step(*arguments)

    blocks.fast_step = full
    for _ in range(2):
        assert torch.equal(graph(*given), expected)
    assert log == ["begin 0", "end 0"]


@torch.no_grad()
def test_without_memory_for_graphs_of_weights_that_move_it_is_said(blocks, log, monkeypatch):
    graph = StepGraph(blocks, torch.device("cpu"), lambda _: True)
    given = inputs(blocks.config)
    graph(*given)
    project = fused_step.__globals__["project"]

    def full(*arguments):
        if "begin 2" in log:
            raise torch.OutOfMemoryError("full")
        return project(*arguments)

    monkeypatch.setitem(fused_step.__globals__, "project", full)
    with pytest.raises(torch.OutOfMemoryError):
        graph(*given)


@torch.no_grad()
def test_on_a_device_that_captures_nothing_steps_run_as_they_are(blocks, log, monkeypatch):
    graph, given = StepGraph(blocks, torch.device("cpu"), lambda _: True), inputs(blocks.config)
    expected = graph(*given)

    def refuse(*_, **__):
        raise RuntimeError("operation not supported")

    monkeypatch.setattr(step_graph.torch.cuda.CUDAGraph, "capture_begin", refuse)
    for _ in range(2):
        assert torch.equal(graph(*given), expected)
