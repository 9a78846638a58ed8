"""A device in main memory that counts every byte, has as few as it is told, and copies late.

It is held to what a GPU does: what it allocates is full of rubbish, a copy arrives at the last
moment that the order allows or at the first, and whatever a computation allocates counts, too.
"""

import collections
import threading
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux_nf4.memory.device import Device

RUBBISH = 0xA7
HOST_BYTES = 1024  # a tensor of fewer may be the host's: tokens, seeds; it is never refused


class Copy:
    """A copy that was asked for."""

    def __init__(self, target, source):
        self.target, self.source, self.is_done = target, source, False


class FakeDevice(Device):
    """`limit` in bytes; allocations numbered in `failing`, 0 the first, find no room."""

    def __init__(self, limit=None, *, failing=(), is_lazy=True):
        super().__init__(torch.device("cpu"))
        self.limit, self.failing, self.is_lazy = limit, set(failing), is_lazy
        self.alive = self.peak = self.num_allocations = 0
        self._known, self._copies, self._lock = set(), collections.deque(), threading.Lock()

    def allocate(self, num_bytes):
        buffer = super().allocate(num_bytes)
        self.count(buffer)
        return buffer.fill_(RUBBISH)

    def count(self, tensor):
        """Take note of a tensor that is new, or refuse it."""
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known or not num_bytes:
            return
        number, self.num_allocations = self.num_allocations, self.num_allocations + 1
        is_full = self.limit is not None and self.alive + num_bytes > self.limit
        if number in self.failing or (is_full and num_bytes >= HOST_BYTES):
            raise torch.OutOfMemoryError(f"no room for {num_bytes} bytes")
        self._known.add(key)
        self.alive += num_bytes
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, num_bytes)

    def leave_out(self, tensor):
        """Count a tensor of the host's never."""
        storage = tensor.untyped_storage()
        self._known.add(storage._cdata)
        weakref.finalize(storage, self._forget, storage._cdata, 0)

    def _forget(self, key, num_bytes):
        self._known.discard(key)
        self.alive -= num_bytes

    def copy(self, target, source, *, after):
        assert target.nbytes == source.nbytes
        copy = Copy(target, source)
        with self._lock:
            self._copies.append(copy)
        if not self.is_lazy:
            self.wait(copy)
        return copy

    def wait(self, mark):
        with self._lock, torch.inference_mode(mode=False):
            while mark is not None and not mark.is_done:
                first = self._copies.popleft()
                first.target.copy_(first.source)
                # As an event, it keeps no memory once it is done.
                first.target, first.source, first.is_done = None, None, True

    reach = wait

    def reset_peak(self):
        self.peak = self.alive

    def peak_bytes(self):
        return self.peak


class Counting(TorchDispatchMode):
    """Within it, what computations allocate is on the device."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self.device.count(leaf)
        return result
