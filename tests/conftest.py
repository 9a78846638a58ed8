"""What holds for every test: no network, one seed, its share of the processors, no GPU no `gpu`."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import pytest
from hypothesis import settings

# Before anything imports torch or the Hugging Face libraries, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# Threads that outnumber the processors wait for one another at every barrier, a hundred times
# longer than they work. Only in xdist's workers: what its controller sets they would inherit.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# The same examples in every run: CI fails for a change, not for bad luck. No deadline: the first
# example of a test may pay for an import.
settings.register_profile("flux_nf4", deadline=None, derandomize=True)
settings.load_profile("flux_nf4")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Their fixture takes half a minute. Workers that have nothing left take over what others would
    # do last; what comes first stays with one worker, and the fixture is made once.
    items.sort(key=lambda item: item.path.parent.name != "training_loops")
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu and not _has_cuda():
        for item in needs_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # Where torch is not imported yet, nothing has drawn from it.
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this machine may be reached, so that no test passes because of something out there."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family != getattr(socket, "AF_UNIX", None) and address[0] not in (
            "127.0.0.1",
            "::1",
            "localhost",
        ):
            pytest.fail(f"a test may not open a network connection: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)
