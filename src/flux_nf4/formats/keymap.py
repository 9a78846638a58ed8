"""The names of tensors, as data: what each part of FLUX must hold, and how each dialect says it.

A table maps every canonical name to the names that stand for it in a dialect; most to one, a fused
matrix to the three or four that are its rows in Diffusers. Tables are grown from templates for any
number of blocks and levels, so nothing here parses a name: what is not in the table is unknown.

Canonical are BFL's names for the transformer, Diffusers' for the VAE, Hugging Face's for T5, and
the `text_model.*` names of transformers 4 for CLIP.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

Dialect: TypeAlias = Literal["bfl", "diffusers"]
Kind: TypeAlias = Literal["transformer", "t5", "clip", "vae"]
Names: TypeAlias = tuple[str, ...]
_Stored = TypeVar("_Stored")

MAX_VAE_LEVELS = 32  # FLUX's has 4; a table must not grow as the product of two hostile numbers

# Modules with a weight and a bias. `{i}` counts blocks.
_OUTER = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_GUIDANCE = {
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
}
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_DOUBLE_SCALES = {
    "img_attn.norm.query_norm.scale": ("attn.norm_q.weight",),
    "img_attn.norm.key_norm.scale": ("attn.norm_k.weight",),
    "txt_attn.norm.query_norm.scale": ("attn.norm_added_q.weight",),
    "txt_attn.norm.key_norm.scale": ("attn.norm_added_k.weight",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
_SINGLE_SCALES = {
    "norm.query_norm.scale": ("attn.norm_q.weight",),
    "norm.key_norm.scale": ("attn.norm_k.weight",),
}
# Diffusers stores (scale, shift) where BFL stores (shift, scale): the halves of the rows change
# places, in the weight and in the bias.
SWAPPED_HALVES = frozenset(
    {"final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias"}
)

_RESNET = {
    **{name: (name,) for name in ("norm1", "conv1", "norm2", "conv2")},
    "conv_shortcut": ("nin_shortcut",),
}
_VAE_ATTENTION = {
    "group_norm": ("norm",),
    "to_q": ("q",),
    "to_k": ("k",),
    "to_v": ("v",),
    "to_out.0": ("proj_out",),
}
# BFL's VAE computes attention with 1x1 convolutions, Diffusers with linear layers: the same
# numbers, [C, C, 1, 1] against [C, C].
VAE_CONVOLUTION_AS_LINEAR = tuple(
    f"{side}.mid_block.attentions.0.{name}.weight"
    for side in ("encoder", "decoder")
    for name in ("to_q", "to_k", "to_v", "to_out.0")
)

_T5_BLOCK = (
    *(f"layer.0.SelfAttention.{name}.weight" for name in "qkvo"),
    "layer.0.layer_norm.weight",
    *(f"layer.1.DenseReluDense.{name}.weight" for name in ("wi_0", "wi_1", "wo")),
    "layer.1.layer_norm.weight",
)
_CLIP_LAYER = tuple(
    f"{module}.{end}"
    for module in (
        *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
        *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
    )
    for end in ("weight", "bias")
)
T5_EMBEDDING = "shared.weight"
T5_EMBEDDING_COPY = "encoder.embed_tokens.weight"
CLIP_PROJECTION = "text_projection.weight"

# Longest first: the first that fits a name decides. Bare names belong to the transformer.
PREFIXES: tuple[tuple[str, Kind], ...] = (
    ("text_encoders.t5xxl.transformer.", "t5"),
    ("text_encoders.clip_l.transformer.", "clip"),
    ("text_encoders.t5xxl.", "t5"),
    ("text_encoders.clip_l.", "clip"),
    ("model.diffusion_model.", "transformer"),
    ("first_stage_model.", "vae"),
    ("vae.", "vae"),
)

# What travels beside a weight `X.weight` that bitsandbytes quantised, after `X.weight.`.
STATE_PREFIX = "quant_state.bitsandbytes__"
MAX_STATE_BYTES = 4096  # of that text of JSON; the real ones have 80 to 180
STATE_SUFFIXES = tuple(STATE_PREFIX + quant_type for quant_type in ("nf4", "fp4"))
COMPANION_SUFFIXES = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    *STATE_SUFFIXES,
)

# The parts that are read in 4 bits. CLIP and the VAE are small, and nobody has them so.
QUANTIZED_KINDS: tuple[Kind, ...] = ("transformer", "t5")

# Names that some files carry and no part needs, after the part's own prefix.
JUNK: dict[str, frozenset[str]] = {
    "transformer": frozenset(),
    "t5": frozenset({"logit_scale"}),
    "clip": frozenset(
        {
            "logit_scale",
            "text_model.embeddings.position_ids",
            "embeddings.position_ids",
        }
    ),
    "vae": frozenset(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Canonical name -> its names in a dialect; `optional` groups are there whole or not at all."""

    names: Mapping[str, Names]
    optional: tuple[frozenset[str], ...] = ()

    def inverse(self) -> dict[str, tuple[str, int]]:
        """Dialect name -> canonical name, and which part of it this is (0 is the first)."""
        return {
            name: (canonical, part)
            for canonical, names in self.names.items()
            for part, name in enumerate(names)
        }

    def required(self, present: Collection[str]) -> set[str]:
        """The canonical names that must be there, given that those in `present` are."""
        absent = (group for group in self.optional if group.isdisjoint(present))
        return set(self.names).difference(*absent)


def transformer_table(
    num_double_blocks: int, num_single_blocks: int, dialect: Dialect = "diffusers"
) -> Table:
    """BFL's names of a transformer -> those of `dialect`, in the order of the rows."""
    names = _with_ends(_OUTER)
    guidance = _with_ends(_GUIDANCE)
    names.update(guidance)
    double = _with_ends(_DOUBLE) | _DOUBLE_SCALES
    single = _with_ends(_SINGLE) | _SINGLE_SCALES
    for i in range(num_double_blocks):
        names.update(_prefixed(double, f"double_blocks.{i}.", f"transformer_blocks.{i}."))
    for i in range(num_single_blocks):
        names.update(_prefixed(single, f"single_blocks.{i}.", f"single_transformer_blocks.{i}."))
    if dialect == "bfl":
        names = {name: (name,) for name in names}
    return Table(names=names, optional=(frozenset(guidance),))


def vae_table(num_levels: int, num_down_resnets: int, dialect: Dialect = "bfl") -> Table:
    """Diffusers' names of an `AutoencoderKL` -> those of `dialect`.

    The decoder has one residual block a level more than the encoder. BFL counts the decoder's
    levels from the finest, Diffusers from the coarsest.
    """
    modules: dict[str, Names] = {}
    shortcuts: list[str] = []
    for i in range(num_levels):
        sides = (
            (f"encoder.down_blocks.{i}.", f"encoder.down.{i}.", num_down_resnets),
            (
                f"decoder.up_blocks.{i}.",
                f"decoder.up.{num_levels - 1 - i}.",
                num_down_resnets + 1,
            ),
        )
        for ours, theirs, num_resnets in sides:
            for j in range(num_resnets):
                resnet = f"{ours}resnets.{j}."
                modules.update(_prefixed(_RESNET, resnet, f"{theirs}block.{j}."))
                shortcuts.append(f"{resnet}conv_shortcut")
        if i < num_levels - 1:  # the last level of either side keeps its resolution
            for (ours, theirs, _), down_or_up in zip(sides, ("down", "up"), strict=True):
                modules[f"{ours}{down_or_up}samplers.0.conv"] = (
                    f"{theirs}{down_or_up}sample.conv",
                )
    for side in ("encoder", "decoder"):
        modules[f"{side}.conv_in"] = (f"{side}.conv_in",)
        modules[f"{side}.conv_norm_out"] = (f"{side}.norm_out",)
        modules[f"{side}.conv_out"] = (f"{side}.conv_out",)
        ours, theirs = f"{side}.mid_block.", f"{side}.mid."
        for j in (0, 1):
            plain = {name: names for name, names in _RESNET.items() if name != "conv_shortcut"}
            modules.update(_prefixed(plain, f"{ours}resnets.{j}.", f"{theirs}block_{j + 1}."))
        modules.update(_prefixed(_VAE_ATTENTION, f"{ours}attentions.0.", f"{theirs}attn_1."))
    names = _with_ends(modules)
    if dialect == "diffusers":
        names = {name: (name,) for name in names}
    optional = tuple(frozenset({f"{name}.weight", f"{name}.bias"}) for name in shortcuts)
    return Table(names=names, optional=optional)


def t5_table(num_blocks: int) -> Table:
    """The names of a T5 encoder; every dialect agrees."""
    names = [T5_EMBEDDING, "encoder.final_layer_norm.weight"]
    names += [f"encoder.block.{i}.{name}" for i in range(num_blocks) for name in _T5_BLOCK]
    if num_blocks:
        names.append("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    return Table(names={name: (name,) for name in names})


def clip_table(num_layers: int, *, flattened: bool = False) -> Table:
    """The names of a CLIP text model; transformers 5 writes them flattened."""
    inner = [
        "embeddings.token_embedding.weight",
        "embeddings.position_embedding.weight",
        "final_layer_norm.weight",
        "final_layer_norm.bias",
    ]
    inner += [f"encoder.layers.{i}.{name}" for i in range(num_layers) for name in _CLIP_LAYER]
    names = {f"text_model.{name}": (name if flattened else f"text_model.{name}",) for name in inner}
    names[CLIP_PROJECTION] = (CLIP_PROJECTION,)
    return Table(names=names, optional=(frozenset({CLIP_PROJECTION}),))


def table_for(kind: str, names: Collection[str]) -> Table:
    """The table that the names of one part call for: its dialect, and how many blocks it has."""
    if kind == "transformer":
        return _transformer_table_for(names)
    if kind == "vae":
        return _vae_table_for(names)
    if kind == "t5":
        return t5_table(_count(names, r"encoder\.block\.([0-9]+)\."))
    prefix = "text_model."
    flattened = not any(name.startswith(prefix) for name in names)
    start = "" if flattened else re.escape(prefix)
    num_layers = _count(names, start + r"encoder\.layers\.([0-9]+)\.")
    return clip_table(num_layers, flattened=flattened)


def all_in_one_table(kind: str, names: Collection[str]) -> Table:
    """Canonical names -> those in an all-in-one file, for as many blocks as `names` have."""
    return _vae_table_for(names, "bfl") if kind == "vae" else table_for(kind, names)


def _transformer_table_for(names: Collection[str]) -> Table:
    is_diffusers = any(name.startswith(("transformer_blocks.", "x_embedder.")) for name in names)
    start = "transformer_blocks" if is_diffusers else "double_blocks"
    num_double = _count(names, start + r"\.([0-9]+)\.")
    start = "single_transformer_blocks" if is_diffusers else "single_blocks"
    num_single = _count(names, start + r"\.([0-9]+)\.")
    return transformer_table(num_double, num_single, "diffusers" if is_diffusers else "bfl")


def _vae_table_for(names: Collection[str], dialect: Dialect | None = None) -> Table:
    is_diffusers = any(name.startswith("encoder.down_blocks.") for name in names)
    level, resnet = ("down_blocks", "resnets") if is_diffusers else ("down", "block")
    num_levels = _count(names, rf"encoder\.{level}\.([0-9]+)\.")
    num_resnets = _count(names, rf"encoder\.{level}\.0\.{resnet}\.([0-9]+)\.")
    dialect = dialect or ("diffusers" if is_diffusers else "bfl")
    return vae_table(min(num_levels, MAX_VAE_LEVELS), min(num_resnets, MAX_VAE_LEVELS), dialect)


def _count(names: Collection[str], pattern: str) -> int:
    # Distinct numbers, not the highest one: a file that names block 999999999 and no other gets
    # a table for one block, and an error that names what does not fit it.
    matches = (re.match(pattern, name) for name in names)
    return len({match[1] for match in matches if match})


def _with_ends(modules: Mapping[str, Names]) -> dict[str, Names]:
    return {
        f"{ours}.{end}": tuple(f"{name}.{end}" for name in theirs)
        for ours, theirs in modules.items()
        for end in ("weight", "bias")
    }


def _prefixed(modules: Mapping[str, Names], ours: str, theirs: str) -> dict[str, Names]:
    return {
        f"{ours}{name}": tuple(f"{theirs}{other}" for other in others)
        for name, others in modules.items()
    }


def split_companion(name: str) -> tuple[str, str] | None:
    """`X.weight.absmax` -> (`X.weight`, `absmax`); None for a name that is no companion's."""
    for suffix in COMPANION_SUFFIXES:
        base = name.removesuffix(f".{suffix}")
        if base != name and base.endswith(".weight"):
            return base, suffix
    return None


def split_prefix(full_name: str, bare: Kind = "transformer") -> tuple[Kind, str]:
    """Which part a tensor of a file belongs to, and its name there; `bare` without a prefix."""
    for prefix, kind in PREFIXES:
        if full_name.startswith(prefix):
            return kind, full_name.removeprefix(prefix)
    return bare, full_name


def separate(
    kind: Kind, tensors: Mapping[str, _Stored]
) -> tuple[dict[str, _Stored], dict[str, dict[str, _Stored]]]:
    """The entries of a part; and of those that are quantised, what travels beside them."""
    plain: dict[str, _Stored] = {}
    companions: dict[str, dict[str, _Stored]] = {}
    for name, stored in tensors.items():
        split = split_companion(name)
        if split is not None:
            companions.setdefault(split[0], {})[split[1]] = stored
        elif name not in JUNK[kind]:
            plain[name] = stored
    return plain, companions


def variant_name(num_channels: int, *, guidance: bool) -> str:
    """Which FLUX.1 has so many input channels, and a guidance embedder or none."""
    if num_channels == 64:
        return "dev" if guidance else "schnell"
    names = {384: "fill", 128: "canny/depth"}
    return names.get(num_channels, f"unknown ({num_channels} input channels)")
