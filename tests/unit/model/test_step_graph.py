"""Which graphs a step becomes, in which order they and the hooks of blocks run; without a GPU."""

from dataclasses import replace

import pytest
import torch
from fake_graphs import fake_graphs
from tiny_config import tiny

from flux_nf4.errors import FormatError
from flux_nf4.model.build import build_transformer
from flux_nf4.model.fast_step import fused_step
from flux_nf4.model.rope import rope_table
from flux_nf4.model.step_graph import CaptureError, StepGraph


@pytest.fixture
def log(monkeypatch):
    """What was done: `begin`, `end` and `replay` of graphs by their number, hooks by name."""
    return fake_graphs(monkeypatch)


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


def full_from(monkeypatch, log, entry):
    """Let products find no memory once something was done."""
    project = fused_step.__globals__["project"]

    def full(*arguments):
        if entry in log:
            raise torch.OutOfMemoryError("full")
        return project(*arguments)

    monkeypatch.setitem(fused_step.__globals__, "project", full)


@torch.no_grad()
@pytest.mark.parametrize(("is_moving", "number"), [(False, 0), (True, 2)])
def test_without_memory_for_graphs_it_is_said(blocks, log, monkeypatch, is_moving, number):
    given = inputs(blocks.config)
    graph = StepGraph(blocks, torch.device("cpu"), lambda _: is_moving)
    graph(*given)
    full_from(monkeypatch, log, f"begin {number}")

    with pytest.raises(CaptureError, match="there is no room"):
        graph(*given)
    assert log[-2:] == [f"begin {number}", f"end {number}"]


@torch.no_grad()
def test_what_could_not_be_captured_is_captured_anew(blocks, log, monkeypatch):
    graph, given = StepGraph(blocks, torch.device("cpu"), lambda _: True), inputs(blocks.config)
    expected = graph(*given)
    with monkeypatch.context() as patch:
        full_from(patch, log, "begin 2")
        with pytest.raises(CaptureError):
            graph(*given)
    log.clear()

    assert torch.equal(graph(*given), expected)
    captured = [entry for entry in log if entry.startswith("replay")]
    log.clear()
    graph(*given)
    assert log == captured


@torch.no_grad()
def test_an_error_between_two_graphs_is_told_as_it_is(blocks, log):
    given, other = inputs(blocks.config), FormatError("damaged")

    def fail(*_):
        if log:
            raise other

    blocks.single_blocks[1].register_forward_pre_hook(fail)
    graph = StepGraph(blocks, torch.device("cpu"), lambda _: True)
    graph(*given)
    with pytest.raises(FormatError) as raised:
        graph(*given)

    assert raised.value is other
    assert log[-1].startswith("replay")  # and no graph was ended twice


@torch.no_grad()
def test_a_device_that_captures_nothing_says_so(blocks, monkeypatch):
    def refuse(action, _number):
        if action == "begin":
            raise RuntimeError("operation not supported\nmore of it")

    log = fake_graphs(monkeypatch, refuse=refuse)
    graph, given = StepGraph(blocks, torch.device("cpu"), lambda _: True), inputs(blocks.config)
    graph(*given)

    with pytest.raises(CaptureError, match=r"^operation not supported$"):
        graph(*given)
    assert log == []
