"""CUDA graphs without a GPU: what is captured runs at once, and what is done is written down."""

import contextlib

from flux_nf4.model import step_graph


class FakeStream:
    def wait_stream(self, _other):
        pass


def fake_graphs(monkeypatch, *, refuse=lambda _action, _number: None):
    """What was done: `begin`, `end` and `replay` of graphs by their number.

    `refuse` may raise before each.
    """
    done, graphs = [], []

    class FakeGraph:
        def __init__(self):
            graphs.append(self)
            self.number = len(graphs) - 1
            self.is_capturing = False

        def _do(self, action):
            refuse(action, self.number)
            done.append(f"{action} {self.number}")

        def capture_begin(self, **_options):
            self._do("begin")
            self.is_capturing = True

        def capture_end(self):
            if not self.is_capturing:
                raise RuntimeError("no capture goes on")
            self.is_capturing = False
            self._do("end")

        def replay(self):
            self._do("replay")

    cuda = step_graph.torch.cuda
    monkeypatch.setattr(cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(cuda, "current_stream", lambda _device: FakeStream())
    monkeypatch.setattr(cuda, "stream", lambda _stream: contextlib.nullcontext())
    monkeypatch.setattr(step_graph, "_side_stream", lambda _device: FakeStream())
    return done
