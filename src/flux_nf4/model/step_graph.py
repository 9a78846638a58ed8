"""A step that is told to a GPU once and then repeated whole, as CUDA graphs.

A step is some 800 kernels. Asking for them takes a CPU 50 to 100 ms, more than a fast GPU needs for
an image; a graph is asked for in one call. A graph knows weights by their place, so those must
stay where they are, or come back to the same place: where a block's weights are streamed, the
graph before ends, and the block's hooks see to them before the next one begins.

The first call runs as it is: kernels are compiled, attention is measured, weights arrive. The
second is captured, graph by graph, each replayed as soon as it is there.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from flux_nf4.model import fused
from flux_nf4.model.blocks import FluxBlocks, call_hooks
from flux_nf4.nf4.scratch import scratch_buffer

LEAST_CALLS = 4  # fewer repay no capture


class CaptureError(Exception):
    """A step cannot be captured. Weights may have moved on meanwhile: it must begin again."""


class StepGraph:
    """`FluxBlocks.forward` without gradients, on CUDA; calls of another shape run as they are.

    `is_moving` tells of a block whether its weights come and go.

    Raises:
        CaptureError: for want of memory, or of a device that can.
        torch.OutOfMemoryError: no room for a step as it is.
    """

    def __init__(
        self,
        blocks: FluxBlocks,
        device: torch.device,
        is_moving: Callable[[nn.Module], bool] = lambda _: False,
    ) -> None:
        self._blocks, self._device, self._is_moving = blocks, device, is_moving
        self._stream = _side_stream(device)
        self._segments: list[tuple[nn.Module | None, torch.cuda.CUDAGraph]] = []
        self._inputs: tuple[Tensor, ...] = ()
        self._output: Tensor | None = None
        self._scratch: Tensor | None = None  # graphs write to it: it must not become another's
        self._is_warm = False

    @staticmethod
    def is_possible(device: torch.device) -> bool:
        """Whether the device has graphs, and kernels that say where a block begins."""
        return fused.has_kernels(device.type)

    def __call__(
        self, img_BLC: Tensor, txt_BTD: Tensor, modulation_BM: Tensor, rope_2SF: Tensor
    ) -> Tensor:
        """As `FluxBlocks.forward`; the result belongs to the caller."""
        # Nothing can be captured on the default stream, and a stream's library workspaces must
        # not be born inside a capture: so all calls run beside it, each in its turn.
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                return self._run(img_BLC, txt_BTD, modulation_BM, rope_2SF)
        finally:
            caller.wait_stream(self._stream)

    def _run(self, *inputs: Tensor) -> Tensor:
        if not self._is_warm:
            self._is_warm = True
            return self._blocks(*inputs)
        if self._output is None:
            return self._captured(inputs)
        if any(held.shape != new.shape for held, new in zip(self._inputs, inputs, strict=True)):
            return self._blocks(*inputs)
        for held, new in zip(self._inputs, inputs, strict=True):
            held.copy_(new)
        for block, graph in self._segments:
            if block is not None:
                call_hooks(block)
            graph.replay()
        return self._output.clone()

    def _captured(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The result of a call whose graphs are kept, if all of them could be captured."""
        torch.cuda.empty_cache()  # the first call's memory is not the graphs'
        held = tuple(each.clone() for each in inputs)
        capture, was_moving = _Capture(), False

        def on_block(block: nn.Module) -> None:
            nonlocal was_moving
            is_moving = self._is_moving(block)
            if is_moving or was_moving:
                capture.end()
                call_hooks(block)
                capture.begin(block)
            was_moving = is_moving

        self._blocks.on_block = on_block
        gc.disable()  # what it frees of others may be nothing that a capture allows
        try:
            capture.begin(None)
            output = self._blocks(*held)
            capture.end()
        except torch.OutOfMemoryError as error:
            raise CaptureError("there is no room for them") from error
        except RuntimeError as error:
            raise CaptureError(str(error).partition("\n")[0]) from error
        finally:
            capture.abandon()
            gc.enable()
            self._blocks.on_block = call_hooks
        self._segments, self._inputs, self._output = capture.segments, held, output
        self._scratch = scratch_buffer(held[0].device)
        return output.clone()


class _Capture:
    """Graphs that are captured one after the other, each replayed as soon as it is there."""

    def __init__(self) -> None:
        self.segments: list[tuple[nn.Module | None, torch.cuda.CUDAGraph]] = []
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin(self, block: nn.Module | None) -> None:
        """Capture what follows, which begins at a block."""
        graph = torch.cuda.CUDAGraph()
        # Only this thread is held to what a capture allows: another loads weights.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self.segments.append((block, graph))
        self._graph = graph

    def end(self) -> None:
        """Capture no more, and do what was captured."""
        graph, self._graph = self._graph, None
        assert graph is not None
        graph.capture_end()
        graph.replay()

    def abandon(self) -> None:
        """Capture no more, if anything still is."""
        if self._graph is not None:
            with contextlib.suppress(RuntimeError):  # it tells again what went wrong
                self._graph.capture_end()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs: each stream has its own cache of memory and its own workspaces."""
    return torch.cuda.Stream(device)
