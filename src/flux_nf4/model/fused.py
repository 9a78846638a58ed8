"""What lies between two matrix products of a block, each as one function: the one door to them.

A step reads and writes its activations a few hundred times between the products. One kernel for
each stretch touches them once, in float32 inside, and hands the next product its input in the form
that it wants: bfloat16, or 8 bits with a scale a token. The functions below are the meaning, in
plain PyTorch; `fused_kernels` are the same in Triton, for tensors on CUDA.

`arithmetic` is that of the layer which reads the result. Where a function has `out` in its name
or says so, it writes into tensors of the caller.

Shape letters, in this module only:
    B  batch    S  tokens    H  hidden size    X  any width
    N  heads    D  head channels    F  D / 2
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_nf4.model.blocks import EPSILON
from flux_nf4.model.rope import rotate
from flux_nf4.nf4.eight_bit import Arithmetic, QuantizedRows, quantize_rows

if TYPE_CHECKING:
    from types import ModuleType

    from flux_nf4.model.blocks import QKNorm, RMSNorm

CENTRE_TOKENS = 32  # whose mean stands for all keys, about
# What a product reads: (B, S, X), plain or quantised.
Rows: TypeAlias = Tensor | QuantizedRows


def has_kernels(device_type: str) -> bool:
    """Whether there are Triton versions for tensors of a device; they are not imported yet."""
    return device_type == "cuda" and importlib.util.find_spec("triton") is not None


@cache
def kernels(device_type: str) -> ModuleType | None:
    """The Triton versions, where they serve tensors of this device."""
    if has_kernels(device_type):
        from flux_nf4.model import fused_kernels

        return fused_kernels
    return None


def norm_modulate(
    x_BSH: Tensor,
    shift_BH: Tensor,
    scale_BH: Tensor,
    arithmetic: Arithmetic,
    update: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Rows]:
    """Add a gated update (B, S, H), (B, H) if there is one; then LayerNorm, scale and shift.

    -> `x_BSH` with the update, which may be the same memory; and the rows for the next product.
    """
    if (fused := kernels(x_BSH.device.type)) is not None:
        return x_BSH, fused.norm_modulate(x_BSH, shift_BH, scale_BH, arithmetic, update)
    if update is not None:
        y_BSH, gate_BH = update
        x_BSH = torch.addcmul(x_BSH, gate_BH[:, None], y_BSH)
    normed_BSH = F.layer_norm(x_BSH.float(), x_BSH.shape[-1:], eps=EPSILON)
    rows = torch.addcmul(shift_BH[:, None].float(), normed_BSH, 1 + scale_BH[:, None].float())
    return x_BSH, _as_rows(rows, arithmetic, x_BSH.dtype)


def norm_rotate_out(
    qkv_BSX: Tensor,
    norm: QKNorm,
    rope_2SF: Tensor,
    heads: tuple[Tensor, Tensor, Tensor | None],
    centre_BND: Tensor | None = None,
) -> None:
    """RMS norm and rotation of queries and keys, written where attention reads them.

    (B, S, 3 * H) -> q, k and v of (B, S, N, D); v is left where it is if None stands for it. Of the
    keys a centre is subtracted, if there is one.
    """
    if (fused := kernels(qkv_BSX.device.type)) is not None:
        scales = norm.query_norm.scale, norm.key_norm.scale
        fused.norm_rotate_out(qkv_BSX, *scales, rope_2SF, heads, centre_BND)
        return
    q_out, k_out, v_out = heads
    q, k, v = qkv_BSX.unflatten(-1, (3, *q_out.shape[2:])).unbind(2)
    q_out.copy_(_normed_rotated(q, norm.query_norm, rope_2SF))
    k_turned = _normed_rotated(k, norm.key_norm, rope_2SF)
    k_out.copy_(k_turned if centre_BND is None else k_turned - centre_BND[:, None])
    if v_out is not None:
        v_out.copy_(v)


def key_centre(qkv_BSX: Tensor, norm: QKNorm, rope_2SF: Tensor) -> Tensor:
    """The mean of some keys, normed and rotated: (B, S, 3 * H) -> (B, N, D).

    Whatever is subtracted from all keys alike changes no attention: every score of a query moves by
    the same. But keys have much in common, and e4m3 rounds what is left much less. So some tokens
    will do, every so many-th, an odd number lest they stand in few columns of the image.
    """
    num_tokens, head_dim = rope_2SF.shape[1], 2 * rope_2SF.shape[2]
    step = num_tokens // CENTRE_TOKENS | 1
    if (fused := kernels(qkv_BSX.device.type)) is not None:
        return fused.key_centre(qkv_BSX, norm.key_norm.scale, rope_2SF, step)
    k = qkv_BSX[:, ::step].unflatten(-1, (3, -1, head_dim))[:, :, 1]
    return _normed_rotated(k, norm.key_norm, rope_2SF[:, ::step]).mean(1).to(qkv_BSX.dtype)


def _normed_rotated(x_BSND: Tensor, norm: RMSNorm, rope_2SF: Tensor) -> Tensor:
    normed = F.rms_norm(x_BSND.float(), x_BSND.shape[-1:], norm.scale, EPSILON)
    return rotate(normed, rope_2SF[:, :, None])


def join(
    attended_BSND: Tensor | None,
    inner_BSX: Tensor | None,
    arithmetic: Arithmetic,
    dtype: torch.dtype,
) -> Rows:
    """Attention's output, then GELU (tanh form) of the inner values; either may be missing.

    `dtype` is that of rows in bf16 arithmetic: attention may have been in another.
    """
    if attended_BSND is not None and inner_BSX is None and arithmetic == "bf16":
        return attended_BSND.flatten(2).to(dtype)
    given = [part for part in (attended_BSND, inner_BSX) if part is not None]
    if (fused := kernels(given[0].device.type)) is not None:
        return fused.join(attended_BSND, inner_BSX, arithmetic, dtype)
    parts = []
    if attended_BSND is not None:
        parts.append(attended_BSND.flatten(2).float())
    if inner_BSX is not None:
        parts.append(F.gelu(inner_BSX.float(), approximate="tanh"))
    rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return _as_rows(rows, arithmetic, dtype)


def _as_rows(values: Tensor, arithmetic: Arithmetic, dtype: torch.dtype) -> Rows:
    return values.to(dtype) if arithmetic == "bf16" else quantize_rows(values, arithmetic)
