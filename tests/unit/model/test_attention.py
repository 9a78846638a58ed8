"""The choice of an attention back end, without a GPU: what is measured is told by the test."""

import contextlib
import sys
from types import ModuleType

import pytest
import torch
from torch.nn.attention import SDPBackend

from flux_nf4.errors import InputError
from flux_nf4.model import attention, attention_fp8


@pytest.fixture
def measured(monkeypatch):
    """Milliseconds by back end, and the calls that asked for them."""
    times, calls = dict.fromkeys(attention.BACKENDS, 1.0), []
    monkeypatch.setattr(attention, "_fastest", {})
    monkeypatch.setattr(attention.torch.cuda, "is_current_stream_capturing", lambda: False)

    def milliseconds(backend, q, k, v):
        calls.append(backend)
        return times[backend]

    monkeypatch.setattr(attention, "_milliseconds", milliseconds)
    return times, calls


def choose(num_tokens=5):
    return attention._fastest_backend(*torch.zeros(3, 1, 2, num_tokens, 64))


def test_the_fastest_back_end_is_taken(measured):
    measured[0][SDPBackend.FLASH_ATTENTION] = 0.5
    assert choose() == SDPBackend.FLASH_ATTENTION


def test_of_equals_the_first_is_taken(measured):
    assert choose() == SDPBackend.CUDNN_ATTENTION


def test_a_shape_is_measured_once(measured):
    choose()
    choose()
    assert measured[1] == list(attention.BACKENDS)


def test_another_order_of_magnitude_is_measured_again(measured):
    choose()
    choose(4096)
    assert len(measured[1]) == 2 * len(attention.BACKENDS)


def test_the_plain_formula_is_left_where_every_back_end_refuses(measured):
    measured[0].update(dict.fromkeys(attention.BACKENDS, float("inf")))
    assert choose() == SDPBackend.MATH


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_only_a_back_end_that_refuses_is_passed_over(monkeypatch, error):
    def attend(*_):
        raise error("no")

    monkeypatch.setattr(attention.torch.cuda, "Event", lambda **_: None)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", attend)
    found = None
    with contextlib.suppress(torch.OutOfMemoryError):
        found = attention._milliseconds(attention.BACKENDS[0], *torch.zeros(3, 1, 2, 5, 64))
    assert found == (None if error is torch.OutOfMemoryError else float("inf"))


def test_nothing_is_measured_while_a_graph_is_captured(measured, monkeypatch):
    monkeypatch.setattr(attention.torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == attention.BACKENDS[0]
    assert measured[1] == []


@pytest.fixture
def card(monkeypatch):
    """A device of compute capability 8.6, with the library; and the layouts it was called with."""
    library, layouts = ModuleType("sageattention"), []

    def sageattn(q, k, v, tensor_layout):
        layouts.append(tensor_layout)
        return attention.attend(q, k, v)

    library.sageattn = sageattn
    library.__spec__ = object()
    monkeypatch.setitem(sys.modules, "sageattention", library)
    monkeypatch.setattr(attention.torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(attention.torch.cuda, "device", lambda _: contextlib.nullcontext())
    return torch.device("cuda"), layouts


def test_attention_is_exact_by_default_and_everywhere():
    assert attention.choose_attention("exact", torch.device("cpu")) is attention.EXACT
    assert attention.EXACT.attend is attention.attend


def test_eight_bits_are_left_to_the_library_with_tokens_before_heads(card):
    device, layouts = card
    q, k, v = torch.randn(3, 2, 5, 4, 64, generator=torch.Generator().manual_seed(1))

    attended = attention.choose_attention("int8", device).attend(q, k, v)

    assert layouts == ["NHD"]
    assert torch.equal(attended, attention.attend(q, k, v))


def test_eight_bits_need_a_card_that_has_them(card, monkeypatch):
    monkeypatch.setattr(attention.torch.cuda, "get_device_capability", lambda _: (7, 5))

    with pytest.raises(InputError, match="`cuda` has no attention in int8"):
        attention.choose_attention("int8", card[0])
    with pytest.raises(InputError, match="`cpu` has no attention in int8"):
        attention.choose_attention("int8", torch.device("cpu"))


def test_eight_bits_need_the_library(card, monkeypatch):
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda _: None)

    with pytest.raises(InputError, match="sageattention") as caught:
        attention.choose_attention("int8", card[0])
    assert "pip install 'flux-nf4[sage]'" in caught.value.hint


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3)])
def test_e4m3_is_cudnns(monkeypatch, capability):
    monkeypatch.setattr(attention.torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: name)
    chosen = attention.choose_attention("fp8", torch.device("cuda"))
    assert chosen == attention.Attention(attention_fp8.attend_fp8, torch.float8_e4m3fn)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_e4m3_needs_a_gpu_that_cudnn_serves(monkeypatch, capability):
    monkeypatch.setattr(attention.torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.raises(InputError, match="`cuda` has no attention in fp8") as caught:
        attention.choose_attention("fp8", torch.device("cuda"))
    assert "H200" in caught.value.hint


def test_e4m3_needs_the_library(monkeypatch):
    monkeypatch.setattr(attention.torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="cudnn") as caught:
        attention.choose_attention("fp8", torch.device("cuda"))
    assert "pip install 'flux-nf4[cudnn]'" in caught.value.hint


def test_a_way_that_nobody_knows_is_refused():
    with pytest.raises(InputError, match="`fp4` is not a way of attention"):
        attention.check_attention("fp4")
