"""What carrying out a plan asks of a device: buffers, copies beside the arithmetic, and order.

Two devices: any at all, where a copy is done when it returns and order needs no events; and CUDA,
with a stream of its own for copies and events between the two. AMD's GPUs are `cuda` to PyTorch;
they and Apple's have not been tried.
"""

from __future__ import annotations

import weakref
from typing import Any, TypeAlias

import torch
from torch import Tensor

Mark: TypeAlias = Any  # a point in what the device was told to do


class Device:
    """Memory and order on one device, where what is asked for is done at once.

    Buffers are flat bytes, free when nothing refers to them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocate(self, num_bytes: int) -> Tensor:
        """A buffer on the device.

        Raises:
            torch.OutOfMemoryError: there is no room.
        """
        with torch.inference_mode(mode=False):  # usable inside and outside of it
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def pin(self, num_bytes: int) -> Tensor:
        """A buffer in host memory that copies start from."""
        with torch.inference_mode(mode=False):
            return torch.empty(num_bytes, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor, *, after: Mark) -> Mark:  # noqa: ARG002
        """Copy to the device beside the arithmetic, once `after` is reached -> when it is done."""
        target.copy_(source)

    def mark(self) -> Mark:
        """The end of the arithmetic that was asked for so far."""

    def wait(self, mark: Mark) -> None:
        """Let the arithmetic that is asked for from now on begin after `mark`."""

    def reach(self, mark: Mark) -> None:
        """Return once `mark` is reached."""

    def release(self) -> None:
        """Give back memory that is reserved and not used."""

    def reset_peak(self) -> None:
        """Begin to measure anew."""

    def peak_bytes(self) -> int | None:
        """The most that was allocated since; None where that is not counted."""
        return None

    def free_bytes(self) -> int | None:
        """What is free for this process; None where that is not known."""
        return None

    def cap(self, num_bytes: int | None) -> None:
        """Let tensors take no more than that, where that can be; None: all there is."""


class CudaDevice(Device):
    """A CUDA device: copies run on a stream of their own, and events keep the order."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        # Segments that grow do not fragment: what is freed at the end of a phase serves the next.
        _configure_allocator("expandable_segments:True")
        self._stream = torch.cuda.Stream(device)

    def pin(self, num_bytes: int) -> Tensor:
        """As `Device`; where the system pins no more, pageable memory, which copies more slowly.

        PyTorch's own pinned memory comes in powers of two: a block of 85 MB would take 128.
        """
        buffer = super().pin(num_bytes)
        address = buffer.data_ptr()
        with torch.cuda.device(self.device):  # a thread begins at the first, and would wake it
            is_pinned = int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)) == 0
        if is_pinned:
            storage = buffer.untyped_storage()
            weakref.finalize(storage, _unpin, address, self.device).atexit = False
        return buffer

    def copy(self, target: Tensor, source: Tensor, *, after: Mark) -> Mark:
        """As `Device`."""
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            done.record(self._stream)
        return done

    def mark(self) -> Mark:
        """As `Device`."""
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self.device))
        return mark

    def wait(self, mark: Mark) -> None:
        """As `Device`."""
        torch.cuda.current_stream(self.device).wait_event(mark)

    def reach(self, mark: Mark) -> None:
        """As `Device`."""
        mark.synchronize()

    def release(self) -> None:
        """As `Device`."""
        torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        """As `Device`."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        """As `Device`."""
        return torch.cuda.max_memory_allocated(self.device)

    def free_bytes(self) -> int | None:
        """As `Device`."""
        return torch.cuda.mem_get_info(self.device)[0]

    def cap(self, num_bytes: int | None) -> None:
        """As `Device`, cached memory included."""
        total_bytes = torch.cuda.mem_get_info(self.device)[1]
        share = 1.0 if num_bytes is None else min(1.0, max(0, num_bytes) / total_bytes)
        torch.cuda.set_per_process_memory_fraction(share, torch.empty(0, device=self.device).device)


def _unpin(address: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.cudart().cudaHostUnregister(address)


def _configure_allocator(settings: str) -> None:
    # Both are PyTorch's own; the second gives way to the first.
    configure = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (configure or torch.cuda.memory._set_allocator_settings)(settings)
