"""From the names in a file to canonical names: nothing unknown, missing or doubled passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flux_nf4.errors import FormatError
from flux_nf4.formats.bnb import weight_from_tensors
from flux_nf4.formats.component import STORED_AS, Component, ComponentKind, Entries, Entry, Parts
from flux_nf4.formats.keymap import (
    QUANTIZED_KINDS,
    SWAPPED_HALVES,
    T5_EMBEDDING,
    T5_EMBEDDING_COPY,
    VAE_CONVOLUTION_AS_LINEAR,
    Table,
    separate,
    split_prefix,
    table_for,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from flux_nf4.formats.tensorfile import TensorFile

MAX_NAMES_LISTED = 8

# What an unknown name gives away about where the file comes from.
_TELLING_NAMES = (
    (("lora", "lokr", "hada_"), "this looks like a LoRA, which goes on top of a model"),
    ((".SCB", ".weight_format"), "this is quantised to 8 bits (LLM.int8); use NF4, bf16 or fp8"),
    ((".weight_scale_2",), "this is NVFP4; use NF4, bf16 or plain fp8"),
    (
        ("scaled_fp8", ".scale_weight", ".weight_scale", ".input_scale", ".comfy_quant"),
        "this is fp8 with separate scales; use NF4, bf16 or plain fp8",
    ),
    ((".qweight", ".wscales"), "this is quantised by SVDQuant; use NF4, bf16 or fp8"),
    (("controlnet_",), "this is a ControlNet, which goes beside a model"),
    (("input_blocks.", "joint_blocks."), "this is Stable Diffusion, not FLUX"),
    (("decoder.conv_in.",), "this looks like a VAE alone; the transformer is another file"),
    (
        ("layer_norm1.", "SelfAttention."),
        "this looks like a text encoder alone; the transformer is another file",
    ),
    (("double_stream_modulation",), "this is FLUX.2; flux-nf4 runs FLUX.1"),
    (("distilled_guidance_layer.",), "this is Chroma, another network; flux-nf4 runs FLUX.1"),
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file that is open: nothing is read until `read`."""

    file: TensorFile
    name: str

    def read(self) -> Tensor:
        """The tensor, backed by the file."""
        return self.file.tensor(self.name)


def list_names(names: Iterable[str]) -> str:
    """At most eight names in sorted order, and how many more there are."""
    ordered = sorted(names)
    listed = ", ".join(f"`{name}`" for name in ordered[:MAX_NAMES_LISTED])
    more = len(ordered) - MAX_NAMES_LISTED
    return listed if more <= 0 else f"{listed} and {more} more"


def tensors_by_part(
    file: TensorFile, bare: ComponentKind = "transformer"
) -> dict[ComponentKind, dict[str, StoredTensor]]:
    """The tensors of a file by their part, named without its prefix; those without one are `bare`.

    Raises:
        FormatError: two names stand for one tensor.
    """
    groups: dict[ComponentKind, dict[str, StoredTensor]] = {}
    for full_name in file.names:
        kind, name = split_prefix(full_name, bare)
        group = groups.setdefault(kind, {})
        if name in group:
            names = list_names([full_name, group[name].name])
            raise FormatError(f"`{file.path}` holds one tensor under two names: {names}")
        group[name] = StoredTensor(file, full_name)
    return groups


def read_component(
    kind: ComponentKind, tensors: Mapping[str, StoredTensor], source: Path
) -> Component:
    """Give the tensors of one part, named without the part's prefix, their canonical names.

    Raises:
        FormatError: a name is unknown or missing, or a tensor is not what its name calls for.
    """
    plain, companions = _separate(kind, tensors, source)
    table = table_for(kind, plain)
    _check_names(kind, plain, table, source)
    parts: dict[str, Parts] = {
        canonical: tuple(_read_entry(plain[name], companions.get(name, {})) for name in names)
        for canonical, names in table.names.items()
        if names[0] in plain
    }
    if kind == "vae":
        _make_linear(parts)
    is_split = any(len(names) > 1 for names in table.names.values())
    swapped = SWAPPED_HALVES if kind == "transformer" and is_split else frozenset()
    try:
        entries = Entries(parts, swapped & parts.keys())
    except FormatError as error:
        raise FormatError(f"`{source}`: {error.message}", hint=error.hint) from error
    files = tuple({id(stored.file): stored.file for stored in tensors.values()}.values())
    return Component(kind=kind, entries=entries, source=source, files=files)


def _separate(
    kind: ComponentKind, tensors: Mapping[str, StoredTensor], source: Path
) -> tuple[dict[str, StoredTensor], dict[str, dict[str, StoredTensor]]]:
    plain, companions = separate(kind, tensors)
    if companions and kind not in QUANTIZED_KINDS:
        raise FormatError(
            f"`{source}`: the {kind} part is quantised by bitsandbytes "
            f"(`{next(iter(companions))}`), which is read for the transformer and T5 only",
            hint="use that part in bf16, fp16 or fp8",
        )
    orphans = companions.keys() - plain.keys()
    if orphans:
        raise FormatError(
            f"`{source}` holds quantisation statistics without their weight: {list_names(orphans)}"
        )
    if kind == "t5":
        drop_embedding_copy(plain, source)
    return plain, companions


def drop_embedding_copy(plain: dict[str, StoredTensor], source: Path) -> None:
    """Leave of T5's table of tokens, which some files hold under two names, the first.

    Raises:
        FormatError: they are two tables.
    """
    copy = plain.pop(T5_EMBEDDING_COPY, None)
    if copy is None:
        return
    if T5_EMBEDDING not in plain:
        plain[T5_EMBEDDING] = copy
        return
    ours, theirs = plain[T5_EMBEDDING].read(), copy.read()
    is_same = ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if is_same and ours.dim() == 2 and len(ours):
        # Three rows tell a copy from another table without reading 260 MB twice.
        rows = [0, len(ours) // 2, len(ours) - 1]
        is_same = torch.equal(
            ours[rows].contiguous().view(torch.uint8), theirs[rows].contiguous().view(torch.uint8)
        )
    if not is_same:
        raise FormatError(f"`{source}`: `{T5_EMBEDDING_COPY}` differs from `{T5_EMBEDDING}`")


def _check_names(
    kind: ComponentKind, plain: Mapping[str, StoredTensor], table: Table, source: Path
) -> None:
    inverse = table.inverse()
    unknown = plain.keys() - inverse.keys()
    present = {inverse[name][0] for name in plain.keys() & inverse.keys()}
    required = table.required(present)
    missing = {name for canonical in required for name in table.names[canonical]} - plain.keys()
    if unknown:
        names = list_names(plain[name].name for name in unknown)
        hint = next(
            (
                text
                for marks, text in _TELLING_NAMES
                if any(mark in name for name in unknown for mark in marks)
            ),
            None,
        )
        raise FormatError(f"`{source}` holds tensors that no FLUX {kind} has: {names}", hint=hint)
    if missing:
        raise FormatError(
            f"`{source}`: the {kind} part lacks {list_names(missing)}",
            hint="the file is incomplete: get it again",
        )


def _read_entry(stored: StoredTensor, companions: Mapping[str, StoredTensor]) -> Entry:
    tensor = stored.read()
    where = f"`{stored.file.path}`"
    if not companions:
        if tensor.dtype not in STORED_AS:
            raise FormatError(
                f"{where}: `{stored.name}` is {tensor.dtype} and has no quantisation statistics; "
                "a weight must be fp32, bf16, fp16 or fp8"
            )
        return tensor
    try:
        return weight_from_tensors(
            stored.name, tensor, {suffix: other.read() for suffix, other in companions.items()}
        )
    except FormatError as error:
        raise FormatError(f"{where}: {error.message}", hint=error.hint) from error


def _make_linear(parts: dict[str, Parts]) -> None:
    for name in VAE_CONVOLUTION_AS_LINEAR:
        tensor = parts[name][0]
        if isinstance(tensor, Tensor) and tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
            parts[name] = (tensor.flatten(1),)
