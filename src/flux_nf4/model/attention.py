"""Attention of the fast path: the quickest exact back end of the device, found by measuring it.

Which one that is depends on the device, PyTorch's version and the shape: on an H200 cuDNN's
reaches 655 TFLOP/s at FLUX's shapes and the flash back end 332. So the first call of a shape times
what is there on its own inputs, some tens of milliseconds, and remembers the winner for as long as
the process lives.

Nothing is copied before or behind it: heads lie behind tokens in memory, as products write and read
them. (With a head's tokens side by side cuDNN was a few percent quicker at best, and no step was.)

In 8 bits (queries and keys in int8, weights of values in float16) the library SageAttention
attends, where it is installed and asked for.

Shape letters, in this module only:
    B  batch    S  tokens    N  heads    D  head channels
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux_nf4.errors import InputError

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
AttentionWish = Literal["exact", "int8"]

# Those that keep no matrix of scores, which is gigabytes. The first is taken where nothing can be
# measured, while a graph is captured.
BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)
NUM_TIMED_CALLS = 3
# The device idles as long before timed calls, until all of them have been asked for.
NUM_HEAD_START_CYCLES = 4_000_000
# SageAttention's kernels hold data types and instructions of Ampere's.
_INT8_CAPABILITY = (8, 0)

_fastest: dict[tuple[Any, ...], SDPBackend] = {}


def check_attention(wish: str) -> None:
    """Raises InputError unless `wish` is a name that this package knows."""
    if wish not in get_args(AttentionWish):
        names = " or ".join(f"`{name}`" for name in get_args(AttentionWish))
        raise InputError(f"`{wish}` is not a way of attention", hint=f"use {names}")


def choose_attention(wish: AttentionWish, device: torch.device) -> Attend:
    """What attends on a device.

    Raises:
        InputError: the device cannot do it in 8 bits, or the library for that is not installed.
    """
    check_attention(wish)
    if wish == "exact":
        return attend
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _INT8_CAPABILITY:
        raise InputError(
            f"`{device}` has no attention in int8",
            hint="it takes an NVIDIA GPU from RTX 30 on; use `exact`",
        )
    if importlib.util.find_spec("sageattention") is None:
        raise InputError(
            "attention in int8 needs the package sageattention, which is not installed",
            hint="`pip install 'flux-nf4[sage]'`, or use `exact`",
        )
    return attend_int8


def attend(q_BSND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
    """Every token looks at every other: (B, S, N, D) three times -> (B, S, N, D)."""
    q, k, v = (x_BSND.transpose(1, 2) for x_BSND in (q_BSND, k_BSND, v_BSND))
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(_fastest_backend(q, k, v)):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attend_int8(q_BSND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
    """As `attend`, in 8 bits; `k_BSND` is written over."""
    from sageattention import sageattn

    with torch.cuda.device(q_BSND.device):  # on which Triton launches, whatever the tensors' own is
        return sageattn(q_BSND, k_BSND, v_BSND, tensor_layout="NHD")


def _fastest_backend(q: Tensor, k: Tensor, v: Tensor) -> SDPBackend:
    # Sequences between two powers of two behave alike, and so do their strides.
    shape_class = (q.device, q.dtype, *q.shape[:2], q.shape[2].bit_length(), q.shape[3])
    backend = _fastest.get(shape_class)
    if backend is None:
        if torch.cuda.is_current_stream_capturing():
            return BACKENDS[0]
        milliseconds = {each: _milliseconds(each, q, k, v) for each in BACKENDS}
        backend = min(BACKENDS, key=milliseconds.__getitem__)
        if milliseconds[backend] == float("inf"):
            backend = SDPBackend.MATH
        _fastest[shape_class] = backend
    return backend


def _milliseconds(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Milliseconds of some calls after a first; infinite where the back end refuses the inputs.

    Raises:
        torch.OutOfMemoryError: no room for a call, which says nothing of the back end.
    """
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with warnings.catch_warnings(), sdpa_kernel(backend):
        warnings.simplefilter("ignore")  # the reasons for which one is not available
        try:
            F.scaled_dot_product_attention(q, k, v)
            torch.cuda._sleep(NUM_HEAD_START_CYCLES)
            start.record()
            for _ in range(NUM_TIMED_CALLS):
                F.scaled_dot_product_attention(q, k, v)
            stop.record()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return float("inf")
    stop.synchronize()
    return start.elapsed_time(stop)
