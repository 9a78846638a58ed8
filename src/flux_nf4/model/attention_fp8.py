"""Attention in e4m3, by cuDNN: on an H200 half as fast again as the fastest exact one.

Queries, keys and values come in e4m3 and the result is in e4m3, none of them scaled: its numbers
are equally precise from 2^-6 to 448, norms hold queries and keys in the middle of that, and a
result is an average of values. Only the weights of values, at most 1, are scaled up. What matters
is that keys are centred first: on the demo model that moves images from 20 to 50 dB (LOG.md).

cuDNN comes with PyTorch, which does not reach this part of it; NVIDIA's package
`nvidia-cudnn-frontend` does.

Shape letters, in this module only:
    B  batch    S  tokens    N  heads    D  head channels
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flux_nf4.errors import InputError

_WEIGHT_SCALE = 256.0  # a power of two below e4m3's largest, 448

# A handle of cuDNN's serves one thread at a time.
_lock = threading.Lock()


def attend_fp8(q_BSND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
    """As `attention.attend`, of contiguous e4m3 and to e4m3: (B, S, N, D) three times -> the same.

    Raises:
        InputError: this version of cuDNN has no kernel for heads of this size.
    """
    out = torch.empty_like(q_BSND)
    device = q_BSND.device
    with _lock, torch.cuda.device(device):
        plan = _plan(device, *q_BSND.shape)
        plan.run(q_BSND, k_BSND, v_BSND, out)
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Attention of one shape on one device, ready to run. `scales` are cuDNN's inputs as well."""

    graph: Any
    handle: Any
    heads: tuple[Any, Any, Any]
    out: Any
    scales: dict[Any, Tensor]

    def run(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        import cudnn

        cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        given = dict(zip((*self.heads, self.out), (q, k, v, out), strict=True))
        workspace = q.new_empty(max(1, self.graph.get_workspace_size()), dtype=torch.uint8)
        self.graph.execute(given | self.scales, workspace, handle=self.handle)


@cache
def _handle(device: torch.device) -> Any:  # noqa: ARG001  that of the current device
    import cudnn

    return cudnn.create_handle()


# Kept for ever: a captured step goes on using the kernels of the plan that it was captured with.
@cache
def _plan(device: torch.device, batch: int, tokens: int, num_heads: int, head_dim: int) -> _Plan:
    import cudnn

    e4m3, float32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    handle = _handle(device)
    graph = cudnn.pygraph(
        io_data_type=e4m3,
        intermediate_data_type=float32,
        compute_data_type=float32,
        handle=handle,
    )
    # cuDNN's order of axes is (B, N, S, D), whatever lies where.
    layout = {
        "dim": [batch, num_heads, tokens, head_dim],
        "stride": [tokens * num_heads * head_dim, head_dim, num_heads * head_dim, 1],
    }
    scalar = {"dim": [1, 1, 1, 1], "stride": [1, 1, 1, 1]}
    values = dict.fromkeys(("descale_q", "descale_k", "descale_v", "scale_o"), 1.0)
    values |= {"scale_s": _WEIGHT_SCALE, "descale_s": 1 / _WEIGHT_SCALE}
    heads = {name: graph.tensor(name=name, data_type=e4m3, **layout) for name in "qkv"}
    scales = {name: graph.tensor(name=name, data_type=float32, **scalar) for name in values}
    out, _, *largest = graph.sdpa_fp8(
        **heads, **scales, attn_scale=head_dim**-0.5, generate_stats=False
    )
    out.set_output(True).set_data_type(e4m3).set_dim(layout["dim"]).set_stride(layout["stride"])
    for each in largest:  # of weights and result; nobody reads them
        each.set_output(False).set_data_type(float32)
        each.set_dim(scalar["dim"]).set_stride(scalar["stride"])
    try:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
    except cudnn.cudnnGraphNotSupportedError as error:
        raise InputError(
            f"cuDNN {cudnn.backend_version()} has no attention in fp8 for heads of {head_dim} "
            f"channels on `{device}`",
            hint="use `exact`",
        ) from error
    return _Plan(
        graph=graph,
        handle=handle,
        heads=tuple(heads.values()),
        out=out,
        scales={
            scales[name]: torch.full((1,), value, dtype=torch.float32, device=device)
            for name, value in values.items()
        },
    )
