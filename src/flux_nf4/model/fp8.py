"""Layers whose weights stay in 8 bits and are widened each time they are used.

They trade a cast per forward for half the memory of bfloat16, as T5 in the all-in-one files and
fp8 checkpoints of the transformer want it. The cast is exact: every value of an 8-bit float is
one of bfloat16 and of float32.

Shape letters, in this module only:
    B  batch    T  tokens    V  vocabulary    N  out features    K  in features
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


class Fp8Linear(nn.Module):
    """A linear layer that keeps its weight in 8 bits and computes in the dtype of its input.

    stored (N, K) 8-bit float, bias (N,) in the dtype that it computes in.
    """

    def __init__(self, stored_NK: Tensor, bias_N: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = stored_NK.shape
        self.stored: Tensor
        self.bias: Tensor | None
        self.register_buffer("stored", stored_NK)
        self.register_buffer("bias", bias_N)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return F.linear(x, self.stored.to(x.dtype), self.bias)


class Fp8Embedding(nn.Module):
    """An embedding table kept in 8 bits; the rows that are looked up come out in `dtype`."""

    def __init__(self, stored_VK: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = stored_VK.shape
        self.dtype = dtype
        self.stored: Tensor
        self.register_buffer("stored", stored_VK)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, K)."""
        # Looked up as bytes: not every device and version indexes 8-bit floats.
        rows = F.embedding(ids, self.stored.view(torch.uint8))
        return rows.view(self.stored.dtype).to(self.dtype)
