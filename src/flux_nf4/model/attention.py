"""Attention of the fast path: the quickest exact back end of the device, found by measuring it.

Which one that is depends on the device, PyTorch's version and the shape: on an H200 cuDNN's
reaches 655 TFLOP/s at FLUX's shapes and the flash back end 332. So the first call of a shape times
what is there on its own inputs, some tens of milliseconds, and remembers the winner for as long as
the process lives.

Nothing is copied before or behind it: heads lie behind tokens in memory, as products write and read
them. (With a head's tokens side by side cuDNN was a few percent quicker at best, and no step was.)

In 8 bits libraries attend, where they are installed and asked for: SageAttention (queries and keys
in int8, weights of values in float16), and cuDNN (everything in e4m3, see `attention_fp8`).

Shape letters, in this module only:
    B  batch    S  tokens    N  heads    D  head channels
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux_nf4.errors import InputError
from flux_nf4.model import attention_fp8

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
AttentionWish = Literal["exact", "fp8", "int8"]

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

_fastest: dict[tuple[Any, ...], SDPBackend] = {}


@dataclass(frozen=True, slots=True)
class Attention:
    """One way to attend: `attend` takes heads of `dtype` and returns such; None: the tokens' own.

    Where `dtype` is another one, keys come centred (`fused.key_centre`).
    """

    attend: Attend
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class _Library:
    """What attends in 8 bits: how, its names, and which GPUs it serves."""

    attention: Attention
    package: str
    extra: str
    serves: Callable[[tuple[int, int]], bool]  # compute capability
    needs: str


def check_attention(wish: str) -> None:
    """Raises InputError unless `wish` is a name that this package knows."""
    if wish not in get_args(AttentionWish):
        names = " or ".join(f"`{name}`" for name in get_args(AttentionWish))
        raise InputError(f"`{wish}` is not a way of attention", hint=f"use {names}")


def choose_attention(wish: AttentionWish, device: torch.device) -> Attention:
    """What attends on a device.

    Raises:
        InputError: the device cannot do it in 8 bits, or the library for that is not installed.
    """
    check_attention(wish)
    if wish == "exact":
        return EXACT
    library = _LIBRARIES[wish]
    is_served = device.type == "cuda" and library.serves(torch.cuda.get_device_capability(device))
    if not is_served:
        raise InputError(
            f"`{device}` has no attention in {wish}", hint=f"it takes {library.needs}; use `exact`"
        )
    if importlib.util.find_spec(library.package) is None:
        raise InputError(
            f"attention in {wish} needs the package {library.package}, which is not installed",
            hint=f"`pip install 'flux-nf4[{library.extra}]'`, or use `exact`",
        )
    return library.attention


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


EXACT = Attention(attend)
_LIBRARIES = {
    "fp8": _Library(
        attention=Attention(attention_fp8.attend_fp8, torch.float8_e4m3fn),
        package="cudnn",
        extra="cudnn",
        # On GeForce cards of compute capability 12 cuDNN has none.
        serves=lambda capability: capability[0] in (9, 10),
        needs="an H100, H200, B200 or their kin",
    ),
    "int8": _Library(
        attention=Attention(attend_int8),
        package="sageattention",
        extra="sage",
        # Its kernels hold data types and instructions of Ampere's.
        serves=lambda capability: capability >= (8, 0),
        needs="an NVIDIA GPU from RTX 30 on",
    ),
}


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
