"""FLUX's two text encoders: T5 for every word, CLIP for the whole prompt.

Only what FLUX uses of them: T5's encoder, and CLIP's pooled output without its projection.

Shape letters, in this module only:
    B  batch    T  tokens    D  hidden size
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flux_nf4.errors import FormatError, InputError
from flux_nf4.formats.keymap import CLIP_PROJECTION
from flux_nf4.model.assemble import assemble, check_compute_dtype
from flux_nf4.model.clip import HEAD_DIM, ClipConfig, ClipText
from flux_nf4.model.sizes import count_blocks, matrix_shape
from flux_nf4.model.t5 import NUM_BUCKETS, T5, T5Config

if TYPE_CHECKING:
    from flux_nf4.formats.component import Component
    from flux_nf4.formats.facts import Facts


class T5Encoder(nn.Module):
    """Token ids to one vector for each token."""

    def __init__(self, model: T5, config: T5Config) -> None:
        super().__init__()
        self.model = model
        self.vocabulary_size = config.vocabulary_size
        self.hidden_size = config.hidden_size

    def forward(self, ids_BT: Tensor) -> Tensor:
        """(B, T) -> (B, T, D), padding included.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        _check_ids(ids_BT, self.vocabulary_size)
        return self.model(ids_BT)


class ClipTextEncoder(nn.Module):
    """Token ids to one vector for the whole prompt."""

    def __init__(self, model: ClipText, config: ClipConfig, eos_token_id: int) -> None:
        super().__init__()
        self.model = model
        self.vocabulary_size = config.vocabulary_size
        self.hidden_size = config.hidden_size
        self.max_length = config.max_length
        self.eos_token_id = eos_token_id

    def forward(self, ids_BT: Tensor) -> Tensor:
        """(B, T) -> (B, D): the state at the first end token, after the last norm.

        Raises:
            InputError: a prompt is too long or lacks its end token, or an id is no token's.
        """
        _check_ids(ids_BT, self.vocabulary_size)
        if ids_BT.shape[1] > self.max_length:
            raise InputError(
                f"CLIP takes at most {self.max_length} tokens, got {ids_BT.shape[1]}",
                hint="cut the prompt where the tokenizer does",
            )
        is_end_BT = ids_BT == self.eos_token_id
        if not bool(is_end_BT.any(dim=1).all()):
            raise InputError(
                f"a prompt's ids hold no end token ({self.eos_token_id})",
                hint="the tokenizer belongs to another model",
            )
        hidden_BTD = self.model(ids_BT)
        # argmax gives the first of equals: the end token is often the padding token, too.
        end_B = is_end_BT.int().argmax(dim=1)
        return hidden_BTD[torch.arange(len(end_B), device=end_B.device), end_B]


def _check_ids(ids_BT: Tensor, vocabulary_size: int) -> None:
    # On a GPU an index out of range would take the whole process down.
    highest = int(ids_BT.max()) if ids_BT.numel() else 0
    if highest >= vocabulary_size:
        raise InputError(
            f"token {highest} is outside the text encoder's vocabulary of {vocabulary_size}",
            hint="the tokenizer belongs to another model",
        )


def build_t5(component: Component, *, device: torch.device | str, dtype: torch.dtype) -> T5Encoder:
    """A T5 v1.1 encoder of any size that computes in `dtype`; 8-bit weights stay in 8 bits.

    Raises:
        InputError: `dtype` is neither bfloat16 nor float32.
        FormatError: the entries are not those of a T5 encoder.
    """
    check_compute_dtype(dtype)
    first = "encoder.block.0.layer"
    vocabulary_size, hidden_size = matrix_shape(component, "shared.weight")
    num_buckets, num_heads = matrix_shape(
        component, f"{first}.0.SelfAttention.relative_attention_bias.weight"
    )
    attention_width, _ = matrix_shape(component, f"{first}.0.SelfAttention.q.weight")
    if num_buckets != NUM_BUCKETS or attention_width % num_heads:
        raise FormatError(
            f"the t5 in `{component.source}` has {num_buckets} buckets of relative distance, "
            f"{num_heads} heads and {attention_width} channels of attention; it must have "
            f"{NUM_BUCKETS} buckets, and channels that divide into the heads"
        )
    config = T5Config(
        vocabulary_size=vocabulary_size,
        hidden_size=hidden_size,
        num_layers=count_blocks(component, "encoder.block"),
        num_heads=num_heads,
        head_dim=attention_width // num_heads,
        mlp_width=matrix_shape(component, f"{first}.1.DenseReluDense.wi_0.weight")[0],
    )
    with torch.device("meta"):
        model = T5(config)
    assemble(model, component, device=device, dtype=dtype)
    return T5Encoder(model, config).eval()


def build_clip(
    component: Component, facts: Facts, *, device: torch.device | str, dtype: torch.dtype
) -> ClipTextEncoder:
    """A CLIP text encoder of any size, pooled where `facts` says that prompts end.

    A `text_projection.weight` in the file is checked and left out: FLUX was trained without it.

    Raises:
        InputError: `dtype` is neither bfloat16 nor float32.
        FormatError: the entries are not those of a CLIP text encoder.
    """
    check_compute_dtype(dtype)
    vocabulary_size, hidden_size = matrix_shape(
        component, "text_model.embeddings.token_embedding.weight"
    )
    num_positions, _ = matrix_shape(component, "text_model.embeddings.position_embedding.weight")
    if not 0 <= facts.clip_eos_token_id < vocabulary_size:
        raise FormatError(
            f"the clip in `{component.source}` has {vocabulary_size} tokens, and prompts would end "
            f"in token {facts.clip_eos_token_id}",
            hint="the file and its facts belong to different models",
        )
    if hidden_size % HEAD_DIM:
        raise FormatError(
            f"the clip in `{component.source}` has a hidden size of {hidden_size}, which does not "
            f"divide into heads of {HEAD_DIM}"
        )
    config = ClipConfig(
        vocabulary_size=vocabulary_size,
        hidden_size=hidden_size,
        num_layers=count_blocks(component, "text_model.encoder.layers"),
        mlp_width=matrix_shape(component, "text_model.encoder.layers.0.mlp.fc1.weight")[0],
        max_length=num_positions,
    )
    with torch.device("meta"):
        model = ClipText(config)
    assemble(model, _without_projection(component), device=device, dtype=dtype)
    return ClipTextEncoder(model, config, facts.clip_eos_token_id).eval()


def _without_projection(component: Component) -> Component:
    if CLIP_PROJECTION in component.entries:
        matrix_shape(component, CLIP_PROJECTION)
    entries = {name: entry for name, entry in component.entries.items() if name != CLIP_PROJECTION}
    return replace(component, entries=entries)
