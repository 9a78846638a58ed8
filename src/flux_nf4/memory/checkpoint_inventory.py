"""Inventories of checkpoints, from their headers alone; and of FLUX.1-dev, by arithmetic.

A plain file is read without torch, as `formats.survey` does. Everything else (folders, weights in
pieces) is opened as `formats.checkpoint` opens it. What a file lacks is taken to be FLUX.1-dev's:
people plan for a transformer before they have fetched its encoders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flux_nf4.errors import FormatError
from flux_nf4.formats.headerfile import open_header
from flux_nf4.formats.keymap import separate, split_prefix, table_for
from flux_nf4.formats.schema import expected_shapes
from flux_nf4.formats.survey import Survey, survey
from flux_nf4.memory.inventory import Entries, Inventory, Stored, take_inventory

if TYPE_CHECKING:
    from flux_nf4.formats.component import Component, ComponentKind
    from flux_nf4.formats.header import TensorInfo

_FORMS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F8_E4M3": "fp8", "F8_E5M2": "fp8 e5m2"}
# What tells the sizes of FLUX.1-dev's parts; every other shape follows.
_SCALE = "norm.query_norm.scale"
_FLUX_1_DEV: dict[ComponentKind, dict[str, tuple[int, ...]]] = {
    "transformer": {
        "img_in.weight": (3072, 64),
        "txt_in.weight": (3072, 4096),
        "vector_in.in_layer.weight": (3072, 768),
        "guidance_in.in_layer.weight": (3072, 256),
        "final_layer.linear.weight": (64, 3072),
        "double_blocks.0.img_mlp.0.weight": (12288, 3072),
        **{f"double_blocks.{i}.img_attn.{_SCALE}": (128,) for i in range(19)},
        "single_blocks.0.linear2.weight": (3072, 15360),
        **{f"single_blocks.{i}.{_SCALE}": (128,) for i in range(38)},
    },
    "t5": {
        "shared.weight": (32128, 4096),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (10240, 4096),
        **{f"encoder.block.{i}.layer.0.SelfAttention.q.weight": (4096, 4096) for i in range(24)},
    },
    "clip": {
        "text_model.embeddings.token_embedding.weight": (49408, 768),
        "text_model.embeddings.position_embedding.weight": (77, 768),
        **{f"text_model.encoder.layers.{i}.mlp.fc1.weight": (3072, 768) for i in range(12)},
    },
    "vae": {
        "decoder.conv_in.weight": (512, 16, 3, 3),
        **{
            f"encoder.down_blocks.{i}.resnets.{j}.conv1.weight": (width, width, 3, 3)
            for i, width in enumerate((128, 256, 512, 512))
            for j in range(2)
        },
    },
}
_BITS = {"bf16": 16, "fp16": 16, "fp32": 32, "fp8": 8}
_STATISTICS = ("absmax", "nested_absmax", "nested_quant_map")  # what a loaded layer keeps


def flux_1_dev(form: str = "nf4 v2") -> Inventory:
    """FLUX.1-dev with its transformer stored as `form`: `nf4 v2`, `nf4 v1`, `fp8` or `bf16`."""
    return take_inventory(f"FLUX.1-dev {form}", _flux_1_dev_entries(form))


def read_inventory(path: str | Path) -> tuple[Inventory, Survey]:
    """What a checkpoint holds, sorted into units, beside its survey.

    Raises:
        ModelNotFoundError, FormatError, InputError: as `formats.checkpoint.open_checkpoint`.
    """
    surveyed = survey(path)
    entries = _plain_entries(surveyed.path) or _checkpoint_entries(surveyed.path)
    for kind in _FLUX_1_DEV:
        if kind in entries:
            _check_shapes(surveyed.path, kind, entries[kind])
    form = surveyed.quantization if surveyed.quantization in _BITS else "nf4 v2"
    complete = {**_flux_1_dev_entries(form), **entries}
    name = f"{surveyed.facts.name} {surveyed.quantization}"
    return take_inventory(name, complete), surveyed


def _check_shapes(path: Path, kind: ComponentKind, entries: Entries) -> None:
    # BFL's VAE has attention as 1 x 1 convolutions: the same numbers as matrices.
    shapes = {
        name: each.shape[:2] if each.shape[2:] == (1, 1) and "attentions" in name else each.shape
        for name, each in entries.items()
    }
    try:
        expected = expected_shapes(kind, shapes)
    except FormatError as error:
        raise FormatError(f"`{path}`: {error.message}", hint=error.hint) from error
    wrong = next((name for name in shapes if shapes[name] != expected.get(name)), None)
    if wrong is not None:
        raise FormatError(
            f"`{path}`: `{wrong}` of the {kind} part has the impossible shape "
            f"{list(shapes[wrong])}",
            hint="`flux-nf4 verify` lists everything that is wrong with it",
        )


def _plain_entries(path: Path) -> dict[str, Entries] | None:
    """From the header; None where that does not tell: a folder, or weights in pieces."""
    if not path.is_file():
        return None
    groups: dict[ComponentKind, dict[str, TensorInfo]] = {}
    with open_header(path) as opened:
        for full_name, info in opened.header.infos.items():
            kind, name = split_prefix(full_name)
            groups.setdefault(kind, {})[name] = info
    try:
        return {kind: _plain_part(kind, infos) for kind, infos in groups.items()}
    except LookupError:
        return None


def _plain_part(kind: ComponentKind, infos: Mapping[str, TensorInfo]) -> Entries:
    plain, companions = separate(kind, infos)
    table = table_for(kind, plain)
    inverse = table.inverse()
    entries = {}
    for name, info in plain.items():
        canonical, _ = inverse[name]
        if len(table.names[canonical]) > 1:
            raise LookupError(name)
        if name not in companions:
            form = _FORMS[info.dtype_name]
            entries[canonical] = Stored(shape=info.shape, form=form, num_bytes=info.num_bytes)
            continue
        # Its shape is in a text that is not read here; a bias tells it without.
        bias = plain[f"{name.removesuffix('weight')}bias"].shape
        num_rows = bias[0] if len(bias) == 1 else 0
        if num_rows == 0:
            raise LookupError(name)
        statistics = [companions[name][each] for each in companions[name] if each in _STATISTICS]
        entries[canonical] = Stored(
            shape=(num_rows, 2 * info.num_bytes // num_rows),
            form="nf4 v1" if "nested_absmax" in companions[name] else "nf4 v2",
            num_bytes=info.num_bytes + sum(each.num_bytes for each in statistics),
        )
    return entries


def _checkpoint_entries(path: Path) -> dict[str, Entries]:
    from flux_nf4.formats.checkpoint import open_checkpoint

    return component_entries(open_checkpoint(path).components)


def component_entries(components: Mapping[ComponentKind, Component]) -> dict[str, Entries]:
    """What the planner reads of parts that are open."""
    from flux_nf4.formats.component import entry_bytes, stored_as
    from flux_nf4.model.sizes import entry_shape

    return {
        kind: {
            name: Stored(
                shape=entry_shape(component, name),
                form=stored_as(component.parts(name)[0]),
                num_bytes=sum(entry_bytes(part) for part in component.parts(name)),
            )
            for name in component.entries
        }
        for kind, component in components.items()
    }


def flux_1_dev_shapes() -> dict[ComponentKind, dict[str, tuple[int, ...]]]:
    """FLUX.1-dev's parts: every canonical name and its shape."""
    return {kind: expected_shapes(kind, shapes) for kind, shapes in _FLUX_1_DEV.items()}


def _flux_1_dev_entries(form: str) -> dict[str, Entries]:
    forms = {"transformer": form, "t5": "fp8", "clip": "fp16", "vae": "bf16"}
    return {
        kind: {name: _as_stored(shape, forms[kind]) for name, shape in shapes.items()}
        for kind, shapes in flux_1_dev_shapes().items()
    }


def _as_stored(shape: tuple[int, ...], form: str) -> Stored:
    num_values = math.prod(shape)
    if form in _BITS:
        return Stored(shape=shape, form=form, num_bytes=num_values * _BITS[form] // 8)
    if len(shape) != 2:
        return Stored(shape=shape, form="bf16", num_bytes=2 * num_values)
    num_blocks = num_values // 64
    nested = num_blocks + 4 * -(-num_blocks // 256) + 4 * 256
    statistics = nested if form == "nf4 v1" else 4 * num_blocks
    return Stored(shape=shape, form=form, num_bytes=num_values // 2 + statistics)
