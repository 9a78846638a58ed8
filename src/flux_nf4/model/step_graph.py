"""A step that is told to a GPU once and then repeated whole, as CUDA graphs.

A step is some 800 kernels. Asking for them takes a CPU 50 to 100 ms, more than a fast GPU needs for
an image; a graph is asked for in one call. A graph knows weights by their place, so those must
stay where they are, or come back to the same place: where a block's weights are streamed, the
graph before ends, and the block's hooks see to them before the next one begins.

The first call runs as it is: kernels are compiled, attention is measured, weights arrive. The
second is captured, graph by graph, each replayed as soon as it is there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from flux_nf4.model import fused
from flux_nf4.model.blocks import FluxBlocks, call_hooks
from flux_nf4.nf4.scratch import scratch_buffer

LEAST_CALLS = 4  # fewer repay no capture


class StepGraph:
    """`FluxBlocks.forward` without gradients, on CUDA; calls of another shape run as they are.

    `is_moving` tells of a block whether its weights come and go. Where the first graph cannot be
    captured, for want of memory or of a device that can, all further calls run as they are.

    Raises:
        torch.OutOfMemoryError: no room for a step; or none for a graph, where weights move.
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
        self._is_warm = self._has_failed = False

    @staticmethod
    def is_possible(device: torch.device) -> bool:
        """Whether the device has graphs, and kernels that say where a block begins."""
        return device.type == "cuda" and fused.kernels(device.type) is not None

    def __call__(
        self, img_BLC: Tensor, txt_BTD: Tensor, modulation_BM: Tensor, rope_2SF: Tensor
    ) -> Tensor:
        """As `FluxBlocks.forward`; the result belongs to the caller."""
        # Nothing can be captured on the default stream, and a stream's library workspaces must
        # not be born inside a capture: so all calls run beside it, each in its turn.
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            velocity_BLC = self._run(img_BLC, txt_BTD, modulation_BM, rope_2SF)
        caller.wait_stream(self._stream)
        return velocity_BLC

    def _run(self, *inputs: Tensor) -> Tensor:
        if not self._is_warm or self._has_failed:
            self._is_warm = True
            return self._blocks(*inputs)
        if self._output is None:
            self._capture(inputs)
        elif any(held.shape != new.shape for held, new in zip(self._inputs, inputs, strict=True)):
            return self._blocks(*inputs)
        else:
            for held, new in zip(self._inputs, inputs, strict=True):
                held.copy_(new)
            for block, graph in self._segments:
                if block is not None:
                    call_hooks(block)
                graph.replay()
        return self._blocks(*inputs) if self._output is None else self._output.clone()

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        torch.cuda.empty_cache()  # the first call's memory is not the graphs'
        self._inputs = tuple(each.clone() for each in inputs)
        pool = torch.cuda.graph_pool_handle()
        was_moving = False

        def begin(block: nn.Module | None) -> None:
            graph = torch.cuda.CUDAGraph()
            # Only this thread is held to what a capture allows: another loads weights.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            self._segments.append((block, graph))

        def on_block(block: nn.Module) -> None:
            nonlocal was_moving
            is_moving = self._is_moving(block)
            if is_moving or was_moving:
                graph = self._segments[-1][1]
                graph.capture_end()
                graph.replay()
                call_hooks(block)
                begin(block)
            was_moving = is_moving

        self._blocks.on_block = on_block
        gc.disable()  # what it frees of others may be nothing that a capture allows
        try:
            begin(None)
            try:
                output = self._blocks(*self._inputs)
            finally:
                self._segments[-1][1].capture_end()
            self._segments[-1][1].replay()
        except RuntimeError:  # out of memory, mostly; no error of our own comes from here
            # Before the second graph no weights have moved: the call may begin again as it is.
            self._has_failed = len(self._segments) <= 1
            self._segments.clear()
            self._inputs = ()
            if not self._has_failed:
                raise
        else:
            self._output, self._scratch = output, scratch_buffer(inputs[0].device)
        finally:
            gc.enable()
            self._blocks.on_block = call_hooks


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs: each stream has its own cache of memory and its own workspaces."""
    return torch.cuda.Stream(device)
