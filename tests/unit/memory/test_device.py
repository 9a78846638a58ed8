"""What is asked of CUDA, where there is none: on which device."""

import contextlib
import types

import torch

from flux_nf4.memory.device import CudaDevice


def test_memory_is_pinned_and_unpinned_for_its_own_device_in_any_thread(monkeypatch):
    current, asked = ["first"], []

    @contextlib.contextmanager
    def device(chosen):
        current.append(chosen)
        yield
        current.pop()

    def note(*_):
        asked.append(current[-1])
        return 0

    runtime = types.SimpleNamespace(cudaHostRegister=note, cudaHostUnregister=note)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    second = object.__new__(CudaDevice)
    second.device = torch.device("cuda:1")
    buffer = second.pin(4096)
    del buffer

    assert asked == [second.device] * 2
