"""FLUX's two text encoders, by way of transformers: T5 for every word, CLIP for the whole.

Here are only the parts of them that FLUX uses: T5's encoder without an attention mask (padding is
attended to, as in training), and CLIP's pooled output without its projection. T5 overflows in
float16 and is never run in it.

Shape letters, in this module only:
    B  batch    T  tokens    D  hidden size
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from flux_nf4.errors import FormatError, InputError
from flux_nf4.model.assemble import assemble, check_compute_dtype
from flux_nf4.model.sizes import count_blocks, matrix_shape

if TYPE_CHECKING:
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.t5.configuration_t5 import T5Config

    from flux_nf4.formats.component import Component
    from flux_nf4.formats.facts import Facts

CLIP_HEAD_DIM = 64  # of every published CLIP text encoder
T5_BUCKETS = 32  # of relative distance, in every published T5; its arithmetic allows few others
CLIP_PROJECTION = "text_projection.weight"


class T5Encoder(nn.Module):
    """Token ids to one vector for each token."""

    def __init__(self, model: nn.Module, config: T5Config) -> None:
        super().__init__()
        self.model = model
        self.vocabulary_size: int = config.vocab_size
        self.hidden_size: int = config.d_model

    def forward(self, ids_BT: Tensor) -> Tensor:
        """(B, T) -> (B, T, D), padding included.

        The table of tokens may lie in main memory while the layers are on a GPU.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        _check_ids(ids_BT, self.vocabulary_size)
        table = cast("nn.Module", self.model.shared)
        (stored,) = table.state_dict().values()
        rows_BTD = table(ids_BT.to(stored.device)).to(ids_BT.device)
        return self.model(inputs_embeds=rows_BTD).last_hidden_state


class ClipTextEncoder(nn.Module):
    """Token ids to one vector for the whole prompt."""

    def __init__(self, model: nn.Module, config: CLIPTextConfig) -> None:
        super().__init__()
        self.model = model
        self.vocabulary_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.max_length: int = config.max_position_embeddings
        self.eos_token_id: int = config.eos_token_id

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
        positions = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        hidden_BTD = self.model(input_ids=ids_BT, position_ids=positions).last_hidden_state
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
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5EncoderModel

    check_compute_dtype(dtype)
    first = "encoder.block.0.layer"
    vocabulary_size, hidden_size = matrix_shape(component, "shared.weight")
    num_buckets, num_heads = matrix_shape(
        component, f"{first}.0.SelfAttention.relative_attention_bias.weight"
    )
    attention_width, _ = matrix_shape(component, f"{first}.0.SelfAttention.q.weight")
    if num_buckets != T5_BUCKETS or attention_width % num_heads:
        raise FormatError(
            f"the t5 in `{component.source}` has {num_buckets} buckets of relative distance, "
            f"{num_heads} heads and {attention_width} channels of attention; it must have "
            f"{T5_BUCKETS} buckets, and channels that divide into the heads"
        )
    config = T5Config(
        vocab_size=vocabulary_size,
        d_model=hidden_size,
        d_kv=attention_width // num_heads,
        d_ff=matrix_shape(component, f"{first}.1.DenseReluDense.wi_0.weight")[0],
        num_layers=count_blocks(component, "encoder.block"),
        num_heads=num_heads,
        relative_attention_num_buckets=num_buckets,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=None,
        eos_token_id=None,
    )
    with torch.device("meta"):
        model = T5EncoderModel(config)
    # The encoder holds the table a second time under another name; it is given back below.
    model.encoder.embed_tokens = None
    assemble(model, component, device=device, dtype=dtype)
    model.encoder.embed_tokens = model.shared
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
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel

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
    if hidden_size % CLIP_HEAD_DIM:
        raise FormatError(
            f"the clip in `{component.source}` has a hidden size of {hidden_size}, which does not "
            f"divide into heads of {CLIP_HEAD_DIM}"
        )
    config = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=matrix_shape(component, "text_model.encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=count_blocks(component, "text_model.encoder.layers"),
        num_attention_heads=hidden_size // CLIP_HEAD_DIM,
        max_position_embeddings=num_positions,
        hidden_act="quick_gelu",
        bos_token_id=None,
        pad_token_id=None,
        eos_token_id=facts.clip_eos_token_id,
    )
    with torch.device("meta"):
        model = CLIPTextModel(config)
    # transformers 5 dropped the `text_model` level from its names at some version.
    level = "" if hasattr(model, "text_model") else "text_model."
    names = {name: level + name for name, _ in model.named_parameters()}
    assemble(model, _without_projection(component), device=device, dtype=dtype, names=names)
    # Still on meta, and not needed: positions are given.
    (model.text_model if hasattr(model, "text_model") else model).embeddings.position_ids = None
    return ClipTextEncoder(model, config).eval()


def _without_projection(component: Component) -> Component:
    if CLIP_PROJECTION not in component.entries:
        return component
    matrix_shape(component, CLIP_PROJECTION)
    entries = {name: component.entries[name] for name in component.entries}
    del entries[CLIP_PROJECTION]
    return replace(component, entries=entries)
