"""Attention in e4m3 with a stand-in for cuDNN, which computes what its graph asks for."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch

from flux_nf4.errors import InputError
from flux_nf4.model import attention, attention_fp8

E4M3 = torch.float8_e4m3fn
SHAPE = (2, 5, 3, 64)


class NotSupportedError(Exception):
    pass


class Described:
    """A tensor as the graph knows it: its name and layout."""

    def __init__(self, **facts):
        self.facts = facts

    def __getattr__(self, name):
        def put(value):
            self.facts[name.removeprefix("set_")] = value
            return self

        return put


class Graph:
    """One product of attention; `execute` reads and writes as the described strides say."""

    def __init__(self, **_):
        self.inputs, self.steps = {}, []

    def tensor(self, **facts):
        return Described(**facts)

    def sdpa_fp8(self, *, attn_scale, generate_stats, **inputs):
        assert not generate_stats
        self.attn_scale, self.inputs = attn_scale, inputs
        self.outputs = [Described() for _ in range(3)]
        return self.outputs[0], None, *self.outputs[1:]

    def __getattr__(self, name):
        return lambda *_: self.steps.append(name)

    def check_support(self):
        self.steps.append("check_support")
        if self.inputs["q"].facts["dim"][3] % 16:
            raise NotSupportedError

    def get_workspace_size(self):
        return 0

    def execute(self, buffers, workspace, handle):
        assert workspace.dtype == torch.uint8
        assert handle == "handle"

        def view(described):
            return buffers[described].as_strided(*(described.facts[x] for x in ("dim", "stride")))

        def scalar(name):
            return float(buffers[self.inputs[name]])

        q, k, v = (view(self.inputs[x]).float() * scalar(f"descale_{x}") for x in "qkv")
        weights = torch.softmax(q @ k.transpose(2, 3) * self.attn_scale, -1)
        weights = (weights * scalar("scale_s")).to(E4M3).float() * scalar("descale_s")
        view(self.outputs[0]).copy_(weights @ v * scalar("scale_o"))
        assert not any(each.facts["output"] for each in self.outputs[1:])


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were built."""
    built, streams = [], []

    def pygraph(**facts):
        built.append(Graph(**facts))
        return built[-1]

    library = SimpleNamespace(
        pygraph=pygraph,
        create_handle=lambda: "handle",
        backend_version=lambda: 91900,
        cudnnGraphNotSupportedError=NotSupportedError,
        set_stream=lambda handle, stream: streams.append((handle, stream)),
        data_type=SimpleNamespace(FP8_E4M3="e4m3", FLOAT="float"),
        heur_mode=SimpleNamespace(A="A"),
    )
    monkeypatch.setitem(sys.modules, "cudnn", library)
    monkeypatch.setattr(attention_fp8.torch.cuda, "device", lambda _: contextlib.nullcontext())
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(attention_fp8.torch.cuda, "current_stream", lambda: stream)
    for cached in (attention_fp8._plan, attention_fp8._handle):
        cached.cache_clear()
    yield built
    for cached in (attention_fp8._plan, attention_fp8._handle):
        cached.cache_clear()
    assert set(streams) <= {("handle", 7)}


def heads(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator).to(E4M3) for _ in range(3)]


def test_it_is_attention_with_weights_and_result_in_e4m3(graphs):
    q, k, v = heads(*SHAPE)

    attended = attention_fp8.attend_fp8(q, k, v)

    exact = attention.attend(q.float(), k.float(), v.float())
    assert (attended.dtype, attended.shape) == (E4M3, SHAPE)
    assert float((attended.float() - exact).norm() / exact.norm()) < 0.05
    order = ["validate", "build_operation_graph", "create_execution_plans", "check_support"]
    assert graphs[0].steps == [*order, "build_plans"]


def test_heads_that_cudnn_has_no_kernel_for_are_told(graphs):
    with pytest.raises(InputError, match="cuDNN 91900 has no attention in fp8 for heads of 24"):
        attention_fp8.attend_fp8(*heads(1, 5, 3, 24))


def test_a_shape_is_planned_once(graphs):
    for shape in (SHAPE, SHAPE, (1, 5, 3, 64)):
        attention_fp8.attend_fp8(*heads(*shape))
    assert len(graphs) == 2
