"""The all-in-one file: transformer in NF4 v2, T5 in fp8, CLIP in fp16 and the VAE, in one.

The layout is that of `flux1-dev-bnb-nf4-v2.safetensors`, so that every tool which reads that file
reads ours. Planning needs shapes alone (tensors on the meta device will do); values are made one
at a time while writing, so a file of 12 GB costs the memory of its largest tensor.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flux_nf4.errors import FormatError, InputError
from flux_nf4.formats.bnb import tensors_from_weight
from flux_nf4.formats.canonical import list_names
from flux_nf4.formats.component import COMPONENT_KINDS, ComponentKind, Entry, outline
from flux_nf4.formats.keymap import VAE_CONVOLUTION_AS_LINEAR, all_in_one_table
from flux_nf4.formats.tensorfile import TensorSource, write_sources
from flux_nf4.nf4.codec import NF4Weight

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from flux_nf4.formats.facts import Facts

# What the names of each part begin with.
PREFIXES: dict[ComponentKind, str] = {
    "transformer": "model.diffusion_model.",
    "t5": "text_encoders.t5xxl.transformer.",
    "clip": "text_encoders.clip_l.transformer.",
    "vae": "vae.",
}
# Two scalars in the reference file that nothing reads; the value is CLIP's, ln(100).
_LOGIT_SCALES: dict[ComponentKind, str] = {
    "t5": "text_encoders.t5xxl.logit_scale",
    "clip": "text_encoders.clip_l.logit_scale",
}
_LOGIT_SCALE = 4.605170249938965


def write_all_in_one(
    path: str | Path,
    components: Mapping[ComponentKind, Mapping[str, Entry]],
    facts: Facts | None,
    *,
    vae_dtype: torch.dtype = torch.bfloat16,
    logit_scales: bool = False,
) -> None:
    """Write components, given under canonical names, as one file in the v2 layout.

    Nested weights are un-nested, exactly. `facts` go into the metadata; None writes none, as the
    reference file has none. With `vae_dtype` float32 and `logit_scales` the file has every tensor
    of the reference file and its length.

    Raises:
        FormatError: a name is unknown or missing, or a value does not fit the type it must take.
        InputError: nothing to write, or another `vae_dtype` than bfloat16 and float32.
        DiskError: the file could not be written; nothing is left behind.
    """
    sources = plan_all_in_one(components, vae_dtype=vae_dtype, logit_scales=logit_scales)
    write_sources(path, sources, metadata=facts.to_metadata() if facts else None)


def plan_all_in_one(
    components: Mapping[ComponentKind, Mapping[str, Entry]],
    *,
    vae_dtype: torch.dtype = torch.bfloat16,
    logit_scales: bool = False,
) -> dict[str, TensorSource]:
    """What `write_all_in_one` would write: name -> dtype, shape, and how to make the values.

    Raises:
        FormatError: a name is unknown or missing.
        InputError: nothing to write, or another `vae_dtype` than bfloat16 and float32.
    """
    if vae_dtype not in (torch.bfloat16, torch.float32):
        raise InputError(f"vae_dtype must be bfloat16 or float32, got {vae_dtype}")
    if not components:
        raise InputError("there is no component to write")
    sources: dict[str, TensorSource] = {}
    for kind in COMPONENT_KINDS:
        if kind not in components:
            continue
        for name, written_name in written_names(kind, components[kind]).items():
            sources.update(_plan_entry(kind, components[kind], name, written_name, vae_dtype))
        if logit_scales and kind in _LOGIT_SCALES:
            make = partial(torch.tensor, _LOGIT_SCALE)
            sources[_LOGIT_SCALES[kind]] = TensorSource(dtype=torch.float32, shape=(), make=make)
    return sources


def written_names(kind: ComponentKind, entries: Mapping[str, Entry]) -> dict[str, str]:
    """Canonical name -> full name in the file, after checking that none is unknown or missing."""
    table = all_in_one_table(kind, entries)
    unknown = entries.keys() - table.names.keys()
    missing = table.required(entries) - entries.keys()
    for names, problem in ((unknown, "is given names it does not have"), (missing, "lacks")):
        if names:
            raise FormatError(f"the {kind} part {problem}: {list_names(names)}")
    return {name: PREFIXES[kind] + table.names[name][0] for name in entries}


def _plan_entry(
    kind: ComponentKind,
    entries: Mapping[str, Entry],
    name: str,
    written_name: str,
    vae_dtype: torch.dtype,
) -> dict[str, TensorSource]:
    entry = outline(entries, name)
    if isinstance(entry, NF4Weight):
        if kind != "transformer":
            raise FormatError(f"`{name}` of the {kind} part is quantised; only the transformer is")
        read = partial(_read_unnested, entries, name)
        return quantized_sources(written_name, entry.with_float_absmax(), read)
    dtype = _written_dtype(kind, name, entry, vae_dtype)
    read_plain = partial(entries.__getitem__, name)
    return {written_name: plain_source(name, entry, dtype, read_plain)}


def _written_dtype(
    kind: ComponentKind, name: str, entry: Tensor, vae_dtype: torch.dtype
) -> torch.dtype:
    if kind == "transformer":
        if name.endswith(".scale"):
            return torch.float32
        return torch.bfloat16 if name.endswith(".bias") else entry.dtype
    dtypes = {"t5": torch.float8_e4m3fn, "clip": torch.float16, "vae": vae_dtype}
    return dtypes[kind]


def _read_unnested(entries: Mapping[str, Entry], name: str) -> NF4Weight:
    weight = entries[name]
    assert isinstance(weight, NF4Weight)
    return weight.with_float_absmax()


def quantized_sources(
    full_name: str, outlined: NF4Weight, read: Callable[[], Entry]
) -> dict[str, TensorSource]:
    """The tensors of a weight that `read` gives, and `outlined` has on the meta device."""
    make_all = partial(_tensors_of, read, full_name)
    sources = {}
    for name, tensor in tensors_from_weight(full_name, outlined).items():
        # The small companions are values already; the rest are outlines, made when due.
        source = TensorSource.of(tensor)
        make = partial(_one_of, make_all, name) if tensor.is_meta else source.make
        sources[name] = replace(source, make=make, make_all=make_all)
    return sources


def _tensors_of(read: Callable[[], Entry], full_name: str) -> dict[str, Tensor]:
    weight = read()
    assert isinstance(weight, NF4Weight)
    return tensors_from_weight(full_name, weight)


def _one_of(make_all: Callable[[], dict[str, Tensor]], name: str) -> Tensor:
    return make_all()[name]


def plain_source(
    name: str,
    outlined: Tensor,
    dtype: torch.dtype,
    read: Callable[[], Entry],
    *,
    as_convolution: bool = True,
) -> TensorSource:
    """A tensor of canonical name `name` in another dtype; `as_convolution` as BFL's VAE has it."""
    shape = tuple(outlined.shape)
    if as_convolution and name in VAE_CONVOLUTION_AS_LINEAR and len(shape) == 2:
        shape = (*shape, 1, 1)
    return TensorSource(dtype=dtype, shape=shape, make=partial(_cast, name, read, dtype, shape))


def _cast(
    name: str, read: Callable[[], Entry], dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    tensor = read()
    assert isinstance(tensor, Tensor)
    return cast_within_range(name, tensor, dtype).reshape(shape)


def cast_within_range(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype, rounded where need be.

    Raises:
        FormatError: a value is out of its range, and would become NaN or infinity without a word.
    """
    limit = torch.finfo(dtype).max
    if torch.finfo(tensor.dtype).max > limit and tensor.numel():
        wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()
        lowest, highest = (each.item() for each in wide.aminmax())
        if not -limit <= lowest <= highest <= limit:
            worst = highest if not highest <= limit else lowest
            raise FormatError(
                f"`{name}` holds {worst}, which {dtype} cannot hold (at most {limit})"
            )
    return tensor.to(dtype)
