"""What a model weighs, unit by unit: the planner's input, made from names, shapes and forms alone.

A unit is what moves at once: a block of the transformer, a layer of T5, a whole small network.
Bytes are those on the device: NF4 and 8-bit weights keep their storage, everything else is cast to
the dtype that computes. Nothing here imports torch, so a plan is made where there is none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from flux_nf4.formats.keymap import CLIP_PROJECTION

SCALE_BYTES = 4  # the vectors of the QK norms are float32 in any arithmetic
_MODULATION = re.compile(r"(double|single)_blocks\.(\d+)\.((img|txt)_mod|modulation)\.")
_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.")
_T5_LAYER = re.compile(r"encoder\.block\.(\d+)\.")
_OUTER = ("img_in.", "txt_in.", "final_layer.linear.")
_T5_TABLE = "shared.weight"
T5_TOKENS = "t5.tokens"
FIXED = "fixed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One entry of a checkpoint: its shape, how it is stored, and its bytes with statistics."""

    shape: tuple[int, ...]
    form: str
    num_bytes: int

    @property
    def is_packed(self) -> bool:
        """Whether a weight stays as it is stored, and is expanded at each use."""
        return self.is_four_bit or self.form.startswith("fp8")

    @property
    def is_four_bit(self) -> bool:
        """Whether its products may be in 8 bits."""
        return self.form.startswith(("nf4", "fp4"))


Entries: TypeAlias = Mapping[str, Stored]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What moves at once; `weights_per_token` are the products that one token costs in it."""

    name: str
    num_bytes: int
    weights_per_token: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The widths that activations follow from; those of the VAE from the finest level on."""

    hidden_size: int
    head_dim: int
    in_channels: int
    context_dim: int
    modulation_width: int
    t5_heads: int
    t5_attention_width: int
    t5_mlp_width: int
    clip_mlp_width: int
    vae_widths: tuple[int, ...]
    vae_num_resnets: int
    compute_bytes: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """A model's units in order of use.

    `fixed_bytes` are on the device at all times: biases and norms of the blocks, and the layers
    before and after them; so are `row_scale_bytes`, which no file holds. `t5_table_bytes` never
    are: a prompt reads 512 rows of 32,128, so they are looked up in host memory.
    `*_scratch_bytes` is the largest weight, expanded for its use. `is_fused`: between products of
    a step run kernels of our own.
    """

    name: str
    t5: tuple[Unit, ...]
    clip: Unit
    conditioner: tuple[Unit, ...]
    blocks: tuple[Unit, ...]
    vae: Unit
    fixed_bytes: int
    t5_table_bytes: int
    t5_scratch_bytes: int
    conditioner_scratch_bytes: int
    block_scratch_bytes: int
    sizes: Sizes
    row_scale_bytes: int = 0
    is_fused: bool = True

    @property
    def num_bytes(self) -> int:
        """All weights."""
        units = (*self.t5, self.clip, *self.conditioner, *self.blocks, self.vae)
        return self.fixed_bytes + self.t5_table_bytes + sum(unit.num_bytes for unit in units)


def take_inventory(
    name: str,
    parts: Mapping[str, Entries],
    *,
    compute_bytes: int = 2,
    is_eight_bit: bool = False,
) -> Inventory:
    """Sort the entries of a model's four parts, under canonical names, into units.

    `is_eight_bit`: the blocks' weights are expanded to 8 bits, and keep two float32 scales a row.
    """
    transformer, t5, vae = parts["transformer"], parts["t5"], parts["vae"]
    # Its projection is checked when it is loaded, and left out.
    clip = {each: entry for each, entry in parts["clip"].items() if each != CLIP_PROJECTION}
    units: dict[str, dict[str, Stored]] = {}
    fixed: dict[str, Stored] = {}
    for entry_name, entry in transformer.items():
        unit_name = unit_of("transformer", entry_name, len(entry.shape))
        (fixed if unit_name == FIXED else units.setdefault(unit_name, {}))[entry_name] = entry
    blocks = [each for each in units if each.startswith("blocks.")]
    conditioner = [each for each in units if each.startswith("conditioner.")]
    layers: dict[str, dict[str, Stored]] = {}
    for entry_name, entry in t5.items():
        layers.setdefault(unit_of("t5", entry_name, len(entry.shape)), {})[entry_name] = entry
    rest, table = layers.pop(FIXED, {}), layers.pop(T5_TOKENS)

    def sized(entries: Entries) -> int:
        return sum(device_bytes(each, entries[each], compute_bytes) for each in entries)

    def unit(unit_name: str, entries: Entries) -> Unit:
        num_weights = sum(math.prod(each.shape) for each in entries.values())
        # In a double block a token of either stream meets that stream's half of the weights.
        share = 2 if unit_name.startswith("blocks.double") else 1
        return Unit(
            name=unit_name, num_bytes=sized(entries), weights_per_token=num_weights // share
        )

    block_entries = [units[each] for each in blocks]
    four_bit = [
        entry for entries in block_entries for entry in entries.values() if entry.is_four_bit
    ]
    return Inventory(
        name=name,
        t5=tuple(unit(each, layers[each]) for each in sorted(layers, key=_order)),
        clip=unit("clip", clip),
        conditioner=tuple(unit(each, units[each]) for each in sorted(conditioner, key=_order)),
        blocks=tuple(unit(each, units[each]) for each in sorted(blocks, key=_order)),
        vae=unit("vae", vae),
        fixed_bytes=sized(fixed) + sized(rest),
        row_scale_bytes=sum(2 * SCALE_BYTES * entry.shape[0] for entry in four_bit if is_eight_bit),
        t5_table_bytes=sized(table),
        t5_scratch_bytes=_scratch(layers.values(), lambda _: compute_bytes),
        conditioner_scratch_bytes=_scratch(
            (units[each] for each in conditioner), lambda _: compute_bytes
        ),
        block_scratch_bytes=_scratch(
            block_entries, lambda each: 1 if is_eight_bit and each.is_four_bit else compute_bytes
        ),
        sizes=_sizes(transformer, t5, clip, vae, compute_bytes),
    )


def device_bytes(name: str, entry: Stored, compute_bytes: int) -> int:
    """What an entry takes once it is loaded."""
    if entry.is_packed and name.endswith(".weight") and len(entry.shape) == 2:
        return entry.num_bytes
    num_values = math.prod(entry.shape)
    return num_values * (SCALE_BYTES if name.endswith(".scale") else compute_bytes)


def unit_of(kind: str, name: str, num_axes: int) -> str:
    """The unit that an entry of a part belongs to; `FIXED` where it is on the device always."""
    if kind == "t5":
        match = _T5_LAYER.match(name)
        return f"t5.{match[1]}" if match else T5_TOKENS if name == _T5_TABLE else FIXED
    if kind != "transformer":
        return kind
    match = _MODULATION.match(name)
    if match:
        return f"conditioner.{match[1]}.{match[2]}"
    match = _BLOCK.match(name)
    if match:
        return f"blocks.{match[1]}.{match[2]}" if num_axes == 2 else FIXED
    if name.startswith(_OUTER):
        return FIXED
    return "conditioner.final" if name.startswith("final_layer.") else "conditioner.embedders"


def _order(unit_name: str) -> tuple[int, int]:
    kinds = ("embedders", "double", "single", "final")
    _, kind, *index = unit_name.split(".")
    return (kinds.index(kind), int(index[0]) if index else 0) if kind in kinds else (0, int(kind))


def _scratch(units: Iterable[Entries], value_bytes: Callable[[Stored], int]) -> int:
    """The largest weight, expanded to so many bytes a value."""
    packed = (
        math.prod(entry.shape) * value_bytes(entry)
        for entries in units
        for entry in entries.values()
        if entry.is_packed and len(entry.shape) == 2
    )
    return max(packed, default=0)


def _sizes(
    transformer: Entries, t5: Entries, clip: Entries, vae: Entries, compute_bytes: int
) -> Sizes:
    hidden_size, in_channels = transformer["img_in.weight"].shape
    scale = next(name for name in transformer if name.endswith("query_norm.scale"))
    modulated = (
        entry.shape[0]
        for name, entry in transformer.items()
        if name.endswith("weight")
        and (_MODULATION.match(name) or name.startswith("final_layer.adaLN_modulation"))
    )
    first = "encoder.block.0.layer"
    num_levels = len({name.split(".")[2] for name in vae if name.startswith("encoder.down_blocks")})
    levels = [f"encoder.down_blocks.{i}.resnets" for i in range(num_levels)]
    return Sizes(
        hidden_size=hidden_size,
        head_dim=transformer[scale].shape[0],
        in_channels=in_channels,
        context_dim=transformer["txt_in.weight"].shape[1],
        modulation_width=sum(modulated),
        t5_heads=t5[f"{first}.0.SelfAttention.relative_attention_bias.weight"].shape[1],
        t5_attention_width=t5[f"{first}.0.SelfAttention.q.weight"].shape[0],
        t5_mlp_width=t5[f"{first}.1.DenseReluDense.wi_0.weight"].shape[0],
        clip_mlp_width=clip["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        vae_widths=tuple(vae[f"{level}.0.conv1.weight"].shape[0] for level in levels),
        vae_num_resnets=sum(
            name.startswith(f"{levels[0]}.") and name.endswith(".conv1.weight") for name in vae
        ),
        compute_bytes=compute_bytes,
    )
