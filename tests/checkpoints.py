"""Tiny random FLUX checkpoints in every layout that people have, for tests.

The models are made by diffusers and transformers and saved by their `save_pretrained`, so that
what our readers meet is what those libraries write. Widths are multiples of 64, as FLUX's are.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from flux_nf4.formats.allinone import write_all_in_one
from flux_nf4.formats.bnb import tensors_from_weight
from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.formats.facts import Facts
from flux_nf4.nf4 import reference

HIDDEN = 128
T5_WIDTH = 64
CLIP_WIDTH = 64
PREFIX = "model.diffusion_model."  # of a transformer in an all-in-one file
PART_FOLDERS = {
    "transformer": "transformer",
    "t5": "text_encoder_2",
    "clip": "text_encoder",
    "vae": "vae",
}
TINY_FACTS = Facts(
    name="tiny",
    clip_eos_token_id=1,
    default_size=64,
    max_sequence_length=32,
    vae_scaling_factor=0.5,
    vae_shift_factor=0.125,
    vae_norm_num_groups=8,
    licence="unknown",
)


def tiny_models(*, seed=0, guidance=True, in_channels=64, num_double_blocks=1, num_single_blocks=2):
    """The four parts as library modules in float32: kind -> module."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=64,
        num_layers=num_double_blocks,
        num_single_layers=num_single_blocks,
        attention_head_dim=64,
        num_attention_heads=HIDDEN // 64,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=(8, 28, 28),
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=96,
            d_model=T5_WIDTH,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=96,
            hidden_size=CLIP_WIDTH,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=CLIP_WIDTH // 64,  # as in every FLUX.1
            projection_dim=CLIP_WIDTH,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=0.5,
        shift_factor=0.125,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return {"transformer": transformer, "t5": t5, "clip": clip, "vae": vae}


def save_diffusers_folder(
    folder, *, models=None, dtype=torch.bfloat16, guidance=True, max_shard_size=None, **sizes
):
    """A Diffusers folder without tokenizers; in shards where `max_shard_size` (bytes) is given."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = Path(folder)
    models = models or tiny_models(guidance=guidance, **sizes)
    for kind, model in models.items():
        shards = {"max_shard_size": max_shard_size} if max_shard_size and kind != "clip" else {}
        model.to(dtype).save_pretrained(folder / PART_FOLDERS[kind], **shards)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance, shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "FluxPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def save_quantized_diffusers_folder(
    folder, *, nested=False, quant_type="nf4", skip=(), models=None, **sizes
):
    """A Diffusers folder whose transformer is quantised as bitsandbytes does, module by module."""
    folder = save_diffusers_folder(folder, models=models, **sizes)
    part = folder / "transformer"
    path = part / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file

    tensors = {}
    for name, tensor in load_file(path).items():
        if tensor.dim() != 2 or name in skip:
            tensors[name] = tensor
            continue
        weight = reference.quantize(tensor, quant_type=quant_type, nested=nested)
        tensors.update(tensors_from_weight(name, weight))
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((part / "config.json").read_text())
    config["quantization_config"] = {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": nested,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    (part / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def canonical_entries(folder):
    """Kind -> entries under canonical names, from any checkpoint."""
    return {kind: part.entries for kind, part in open_checkpoint(folder).components.items()}


def quantized(entries, *, nested=False, quant_type="nf4", block_size=64):
    """A transformer's canonical entries with every matrix quantised."""
    return {
        name: reference.quantize(entry, nested=nested, quant_type=quant_type, block_size=block_size)
        if name.endswith(".weight")
        else entry
        for name, entry in entries.items()
    }


def cast(entries, dtype):
    """A transformer's canonical entries with every matrix in another dtype."""
    return {
        name: entry.to(dtype) if name.endswith(".weight") else entry
        for name, entry in entries.items()
    }


def tiny_components(folder, *, transformer="nf4", nested=False, **sizes):
    """Canonical entries of all four parts, the transformer as `nf4`, `fp4` or in a torch dtype.

    `folder` is where the Diffusers folder that they are read from is left.
    """
    components = canonical_entries(save_diffusers_folder(folder, **sizes))
    entries = components["transformer"]
    components["transformer"] = (
        quantized(entries, nested=nested, quant_type=transformer)
        if isinstance(transformer, str)
        else cast(entries, transformer)
    )
    return components


def save_all_in_one(path, *, transformer="nf4", facts=TINY_FACTS, **sizes):
    """An all-in-one file by our own writer; the Diffusers folder it comes from stays beside it."""
    path = Path(path)
    source = path.with_name(f"{path.stem}-source")
    components = tiny_components(source, transformer=transformer, **sizes)
    write_all_in_one(path, components, facts)
    return path


def save_all_in_one_v1(path, *, facts=None, **sizes):
    """An all-in-one file with nested statistics, which our writer does not make."""
    path = Path(path)
    v2 = save_all_in_one(path.with_name(f"{path.stem}-v2.safetensors"), facts=facts, **sizes)
    from flux_nf4.formats.tensorfile import TensorFile

    file = TensorFile(v2)
    tensors = {n: file.tensor(n) for n in file.names if not n.startswith(PREFIX)}
    source = canonical_entries(path.with_name(f"{v2.stem}-source"))["transformer"]
    tensors.update(transformer_tensors(quantized(source, nested=True), prefix=PREFIX))
    save_file(tensors, path, metadata=facts.to_metadata() if facts else None)
    v2.unlink()
    return path


def transformer_tensors(entries, *, prefix=""):
    """Canonical transformer entries -> tensors as a file holds them, under BFL's names."""
    tensors = {}
    for name, entry in entries.items():
        if isinstance(entry, torch.Tensor):
            tensors[prefix + name] = entry.contiguous()
        else:
            tensors.update(tensors_from_weight(prefix + name, entry))
    return tensors


def save_transformer_only(path, entries, *, prefix=PREFIX):
    """A file with a transformer alone, under BFL's names."""
    save_file(transformer_tensors(entries, prefix=prefix), path)
    return Path(path)
