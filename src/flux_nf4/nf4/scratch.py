"""One buffer a device that every expanded weight passes through.

A weight is expanded, multiplied and forgotten, layer after layer. With one buffer for all of them
the peak of memory is known, the allocator never sees 130 MB come and go, and a captured graph
finds the same address again. It is as large as the largest weight asked for so far.

One thread's layers run one after another on one stream; other threads get buffers of their own.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_of_thread = threading.local()


def scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor; the next call on this device and thread gives the same memory."""
    num_bytes = math.prod(shape) * dtype.itemsize
    buffers: dict[torch.device, Tensor] = _of_thread.__dict__.setdefault("buffers", {})
    buffer = buffers.get(device)
    if buffer is None or buffer.numel() < num_bytes:
        # Let go of the old one first: both at once may not fit.
        buffer = buffers[device] = torch.empty(0, dtype=torch.uint8, device=device)
        with torch.inference_mode(mode=False):  # usable inside and outside of it
            buffer = buffers[device] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return buffer[:num_bytes].view(dtype).view(*shape)


def scratch_buffer(device: torch.device) -> Tensor | None:
    """This thread's buffer on a device, if any; to hold it keeps its memory from other uses."""
    buffers: dict[torch.device, Tensor] = _of_thread.__dict__.get("buffers", {})
    return buffers.get(device)


def release() -> None:
    """Give back this thread's buffers, on every device."""
    _of_thread.__dict__.pop("buffers", None)
