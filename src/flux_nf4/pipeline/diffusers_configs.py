"""The small JSON files of a Diffusers folder, for a model of any size.

Diffusers and transformers read sizes from there; ours come from names and shapes, as everywhere,
and the constants from the model's facts. What is said here, `formats.folder.read_facts` reads back.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from flux_nf4.formats.component import COMPONENT_KINDS
from flux_nf4.formats.folder import MODEL_INDEX, PART_FOLDERS, TOKENIZER_FOLDERS
from flux_nf4.formats.keymap import CLIP_PROJECTION
from flux_nf4.model.clip import HEAD_DIM
from flux_nf4.model.sizes import count_blocks, flux_config, matrix_shape, shape_of
from flux_nf4.pipeline.tokenizers import CLIP_LENGTH, packaged_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flux_nf4.formats.component import Component, ComponentKind
    from flux_nf4.formats.facts import Facts
    from flux_nf4.formats.tensorfile import TensorSource

DIFFUSERS_VERSION = "0.38.0"  # the oldest whose FLUX classes read these files
WEIGHT_FILES: dict[ComponentKind, str] = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "t5": "model.safetensors",
    "clip": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
_CLASSES: dict[ComponentKind, tuple[str, str]] = {
    "transformer": ("diffusers", "FluxTransformer2DModel"),
    "t5": ("transformers", "T5EncoderModel"),
    "clip": ("transformers", "CLIPTextModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
_STATE = ".quant_state.bitsandbytes__"


def diffusers_texts(
    components: Mapping[ComponentKind, Component],
    facts: Facts,
    sources: Mapping[ComponentKind, Mapping[str, TensorSource]],
    *,
    own_tokenizers: bool,
) -> dict[str, bytes]:
    """Every small file of the folder: path -> bytes. `sources` are the tensors to be written.

    With `own_tokenizers` those packaged under the facts' name are among them.

    Raises:
        FormatError: an entry that tells a size is missing or misshapen.
        ModelNotFoundError: the package holds no tokenizers of that name.
    """
    makers = {"transformer": _transformer, "t5": _t5, "clip": _clip, "vae": _vae}
    configs = {kind: makers[kind](components[kind], facts) for kind in components}
    if "transformer" in configs:
        configs["transformer"].update(_quantization(sources["transformer"]))
    texts = {
        f"{PART_FOLDERS[kind]}/config.json": _encode(config) for kind, config in configs.items()
    }
    texts["scheduler/scheduler_config.json"] = _encode(_scheduler(facts))
    texts[MODEL_INDEX] = _encode(_index(components))
    if own_tokenizers:
        texts.update(_tokenizers(facts))
    return texts


def _encode(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _index(components: Mapping[ComponentKind, Component]) -> dict[str, Any]:
    parts = {
        PART_FOLDERS[kind]: _CLASSES[kind] if kind in components else (None, None)
        for kind in COMPONENT_KINDS
    }
    tokenizer = ("transformers", "PreTrainedTokenizerFast")
    return {
        "_class_name": "FluxPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        **dict.fromkeys(TOKENIZER_FOLDERS.values(), tokenizer),
        **parts,
        "image_encoder": (None, None),
        "feature_extractor": (None, None),
    }


def _transformer(component: Component, _facts: Facts) -> dict[str, Any]:
    config = flux_config(component)
    return {
        "_class_name": "FluxTransformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "attention_head_dim": config.head_dim,
        "axes_dims_rope": config.axes_dim,
        "guidance_embeds": config.guidance_embed,
        "in_channels": config.in_channels,
        "joint_attention_dim": config.context_dim,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_double_blocks,
        "num_single_layers": config.num_single_blocks,
        "out_channels": config.out_channels,
        "patch_size": 1,
        "pooled_projection_dim": config.pooled_dim,
    }


def _quantization(sources: Mapping[str, TensorSource]) -> dict[str, Any]:
    """`quantization_config`, as Diffusers writes it; nothing where no weight is quantised."""
    states = [name.partition(_STATE)[2] for name in sources if _STATE in name]
    if not states:
        return {}
    plain = [
        name.removesuffix(".weight")
        for name, source in sources.items()
        if name.endswith(".weight") and len(source.shape) == 2 and f"{name}.absmax" not in sources
    ]
    nested = any(name.endswith(".nested_absmax") for name in sources)
    return {
        "quantization_config": {
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": states[0],
            "bnb_4bit_use_double_quant": nested,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": sorted(plain) or None,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "quant_method": "bitsandbytes",
        }
    }


def _t5(component: Component, _facts: Facts) -> dict[str, Any]:
    first = "encoder.block.0.layer"
    vocabulary_size, hidden_size = matrix_shape(component, "shared.weight")
    num_buckets, num_heads = matrix_shape(
        component, f"{first}.0.SelfAttention.relative_attention_bias.weight"
    )
    attention_width, _ = matrix_shape(component, f"{first}.0.SelfAttention.q.weight")
    num_blocks = count_blocks(component, "encoder.block")
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": matrix_shape(component, f"{first}.1.DenseReluDense.wi_0.weight")[0],
        "d_kv": attention_width // num_heads,
        "d_model": hidden_size,
        "dropout_rate": 0.1,
        "dtype": "bfloat16",
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "layer_norm_epsilon": 1e-6,
        "model_type": "t5",
        "num_decoder_layers": num_blocks,
        "num_heads": num_heads,
        "num_layers": num_blocks,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": num_buckets,
        "tie_word_embeddings": True,
        "use_cache": False,
        "vocab_size": vocabulary_size,
    }


def _clip(component: Component, facts: Facts) -> dict[str, Any]:
    vocabulary_size, hidden_size = matrix_shape(
        component, "text_model.embeddings.token_embedding.weight"
    )
    num_positions, _ = matrix_shape(component, "text_model.embeddings.position_embedding.weight")
    has_projection = CLIP_PROJECTION in component.entries
    return {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": facts.clip_eos_token_id - 1,
        "dtype": "bfloat16",
        "eos_token_id": facts.clip_eos_token_id,
        "hidden_act": "quick_gelu",
        "hidden_size": hidden_size,
        "intermediate_size": matrix_shape(component, "text_model.encoder.layers.0.mlp.fc1.weight")[
            0
        ],
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": num_positions,
        "model_type": "clip_text_model",
        "num_attention_heads": max(hidden_size // HEAD_DIM, 1),
        "num_hidden_layers": count_blocks(component, "text_model.encoder.layers"),
        "pad_token_id": 1,
        "projection_dim": matrix_shape(component, CLIP_PROJECTION)[0]
        if has_projection
        else hidden_size,
        "vocab_size": vocabulary_size,
    }


def _vae(component: Component, facts: Facts) -> dict[str, Any]:
    num_levels = count_blocks(component, "encoder.down_blocks")
    widths = [
        shape_of(component, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", num_axes=4)[0]
        for i in range(num_levels)
    ]
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": shape_of(component, "decoder.conv_in.weight", num_axes=4)[1],
        "layers_per_block": count_blocks(component, "encoder.down_blocks.0.resnets"),
        "mid_block_add_attention": True,
        "norm_num_groups": facts.vae_norm_num_groups,
        "out_channels": 3,
        "sample_size": facts.default_size,
        "scaling_factor": facts.vae_scaling_factor,
        "shift_factor": facts.vae_shift_factor,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def _scheduler(facts: Facts) -> dict[str, Any]:
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "base_image_seq_len": facts.base_image_seq_len,
        "base_shift": facts.base_shift,
        "max_image_seq_len": facts.max_image_seq_len,
        "max_shift": facts.max_shift,
        "num_train_timesteps": 1000,
        "shift": facts.shift,
        "use_dynamic_shifting": facts.use_dynamic_shifting,
    }


def _tokenizers(facts: Facts) -> dict[str, bytes]:
    marks = {
        "t5": {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
        "clip": {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
        },
    }
    lengths = {"t5": facts.max_sequence_length, "clip": CLIP_LENGTH}
    texts: dict[str, bytes] = {}
    for kind, folder in TOKENIZER_FOLDERS.items():
        texts[f"{folder}/tokenizer.json"] = packaged_text(facts.tokenizer, kind)
        texts[f"{folder}/tokenizer_config.json"] = _encode(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                "model_max_length": lengths[kind],
                **marks[kind],
            }
        )
    return texts
