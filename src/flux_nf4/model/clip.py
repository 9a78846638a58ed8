"""CLIP's text encoder: causal attention over a prompt. Equal to transformers' `CLIPTextModel`.

Names of modules are Hugging Face's, so that a checkpoint's names are theirs.

Shape letters, in this module only:
    B  batch    T  tokens    D  hidden size
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_nf4.model.assemble import empty_embedding

HEAD_DIM = 64  # of every published CLIP text encoder
EPSILON = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig:
    """Sizes of an encoder."""

    vocabulary_size: int
    hidden_size: int
    num_layers: int
    mlp_width: int
    max_length: int


class ClipText(nn.Module):
    """Token ids to the state of each token, after the last norm."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.text_model = _TextModel(config)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        return self.text_model(ids_BT)


class _TextModel(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=EPSILON)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(ids_BT)))


class _Embeddings(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.token_embedding = empty_embedding(config.vocabulary_size, config.hidden_size)
        self.position_embedding = empty_embedding(config.max_length, config.hidden_size)

    def forward(self, ids_BT: Tensor) -> Tensor:
        positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        return self.token_embedding(ids_BT) + self.position_embedding(positions_T)


class _Encoder(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))

    def forward(self, x_BTD: Tensor) -> Tensor:
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return x_BTD


class _Layer(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=EPSILON)
        self.self_attn = _Attention(config.hidden_size)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=EPSILON)
        self.mlp = _Mlp(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.layer_norm1(x_BTD))
        return x_BTD + self.mlp(self.layer_norm2(x_BTD))


class _Attention(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (
            layer(x_BTD).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        inner = self.fc1(x_BTD)
        return self.fc2(inner * torch.sigmoid(1.702 * inner))  # CLIP's own GELU
