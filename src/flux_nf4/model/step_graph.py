"""A step that is told to a GPU once and then repeated whole, as a CUDA graph.

A step is some 800 kernels. Asking for them takes a CPU 30 to 50 ms, more than a fast GPU needs for
an image of 512 x 512; a graph is asked for in one call. Weights and the scratch buffer must stay
where they are while it lives, so it is made for one denoise loop, in which nothing is streamed.

The first call runs as it is: kernels are compiled, attention is measured, weights arrive. The
graph is captured behind it, while the device still works on that call.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flux_nf4.model.blocks import FluxBlocks

LEAST_CALLS = 4  # fewer repay no capture


class StepGraph:
    """`FluxBlocks.forward` for calls of one shape, without gradients, on CUDA.

    A graph has activations of its own, as large as those of the first call. Where both together
    may not fit (`is_roomy` is false), the second call waits for the first and frees its memory
    before it captures. Without memory even then, every call runs as it is.
    """

    def __init__(self, blocks: FluxBlocks, device: torch.device, *, is_roomy: bool) -> None:
        self._blocks, self._is_roomy = blocks, is_roomy
        self._stream = _side_stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._output: Tensor | None = None
        self._is_warm = self._has_failed = False

    def __call__(
        self, img_BLC: Tensor, txt_BTD: Tensor, modulation_BM: Tensor, rope_2SF: Tensor
    ) -> Tensor:
        """As `FluxBlocks.forward`; the result belongs to the caller."""
        inputs = (img_BLC, txt_BTD, modulation_BM, rope_2SF)
        # Nothing can be captured on the default stream, and a stream's library workspaces must
        # not be born inside a capture: so all calls run beside it, each in its turn.
        caller = torch.cuda.current_stream(img_BLC.device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            velocity_BLC = self._run(*inputs)
        caller.wait_stream(self._stream)
        return velocity_BLC

    def _run(self, *inputs: Tensor) -> Tensor:
        if self._graph is None and self._is_warm and not self._has_failed:
            torch.cuda.empty_cache()
            self._capture(*inputs)
        if self._graph is not None and self._fits(inputs):
            for captured, given in zip(self._inputs, inputs, strict=True):
                captured.copy_(given)
            self._graph.replay()
            assert self._output is not None
            return self._output.clone()
        velocity_BLC = self._blocks(*inputs)
        if not self._is_warm and self._is_roomy:
            self._capture(*inputs)
        self._is_warm = True
        return velocity_BLC

    def _fits(self, inputs: tuple[Tensor, ...]) -> bool:
        pairs = zip(self._inputs, inputs, strict=True)
        return all(captured.shape == given.shape for captured, given in pairs)

    def _capture(self, *inputs: Tensor) -> None:
        self._inputs = [each.clone() for each in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            # Only this thread is held to what a capture allows: another may be loading weights.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._output = self._blocks(*self._inputs)
            finally:
                graph.capture_end()
        except RuntimeError:  # out of memory, mostly
            self._has_failed = True
            self._inputs.clear()
        else:
            self._graph = graph


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs: each stream has its own cache of memory and its own workspaces."""
    return torch.cuda.Stream(device)
