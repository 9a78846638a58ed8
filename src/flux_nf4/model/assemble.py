"""Put a checkpoint's tensors into a module that was built without any.

A module is built on the meta device, where it has shapes and no memory; then each entry takes
its place, cast and moved once. An entry that is already right (a memory-mapped tensor of the
wanted dtype, on the CPU) is taken as it is. Quantised entries bring their own layer.

On the meta device a module gets its layers and no values: `memory.contents` brings those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from flux_nf4.errors import FormatError, InputError
from flux_nf4.formats.bnb import check_absmax_is_finite
from flux_nf4.formats.component import Component, Entry, outline
from flux_nf4.model.fp8 import FP8_DTYPES, Fp8Embedding, Fp8Linear
from flux_nf4.model.sizes import entry_shape
from flux_nf4.nf4.codec import NF4Weight
from flux_nf4.nf4.linear import NF4Linear

COMPUTE_DTYPES = (torch.bfloat16, torch.float32)
MAX_NAMES_IN_MESSAGE = 20


def check_compute_dtype(dtype: torch.dtype) -> None:
    """Refuse a dtype that FLUX cannot compute in.

    Raises:
        InputError: `dtype` is neither bfloat16 nor float32.
    """
    if dtype not in COMPUTE_DTYPES:
        raise InputError(
            f"FLUX computes in bfloat16 or float32, not in {str(dtype).removeprefix('torch.')}",
            hint="use `torch.bfloat16`: FLUX overflows float16",
        )


def empty_embedding(num_rows: int, width: int) -> nn.Embedding:
    """An embedding whose values are still to come.

    `nn.Embedding` would draw random ones, for which PyTorch imports its compiler: a second.
    """
    return nn.Embedding.from_pretrained(torch.empty(num_rows, width))


def assemble(
    module: nn.Module,
    component: Component,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    names: Mapping[str, str] | None = None,
) -> None:
    """Fill `module`, whose parameters are on meta, with the entries of `component`.

    `names` gives the entry for each parameter of the module; without it the names are the same.
    Afterwards every entry has found its parameter and every parameter its entry, nothing needs a
    gradient, and the module is in eval mode. NF4 and 8-bit weights keep their storage.

    Raises:
        FormatError: entries are unknown, missing, misshapen or of a wrong dtype; it lists them.
    """
    if names is None:
        names = {name: name for name, _ in module.named_parameters()}
    _check_entries(module, component, names)
    is_meta = torch.device(device).type == "meta"
    for path, owner in list(module.named_modules()):
        prefix = f"{path}." if path else ""
        given = {
            leaf: outline(component.entries, names[prefix + leaf])
            if is_meta
            else component.entries[names[prefix + leaf]]
            for leaf, _ in owner.named_parameters(recurse=False)
        }
        weight = given.get("weight")
        if isinstance(weight, NF4Weight) and not is_meta:
            check_absmax_is_finite(names[f"{prefix}weight"], weight)
        layer = _quantised_layer(owner, given, device, dtype)
        if layer is not None:
            module.set_submodule(path, layer)
            continue
        for leaf, entry in given.items():
            assert isinstance(entry, Tensor)
            # `scale` is the vector of a QK norm, which computes in float32.
            value = entry.to(device=device, dtype=torch.float32 if leaf == "scale" else dtype)
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
    module.eval()


def _quantised_layer(
    owner: nn.Module,
    given: Mapping[str, Entry],
    device: torch.device | str,
    dtype: torch.dtype,
) -> nn.Module | None:
    """The layer that keeps the weight of `owner` in few bits; None where it is a plain tensor."""
    weight, bias = given.get("weight"), given.get("bias")
    if isinstance(bias, Tensor):
        bias = bias.to(device=device, dtype=dtype)
    assert not isinstance(bias, NF4Weight)
    if isinstance(weight, NF4Weight):
        return NF4Linear(weight.to(device), bias)
    if weight is None or weight.dtype not in FP8_DTYPES:
        return None
    if isinstance(owner, nn.Linear):
        return Fp8Linear(weight.to(device), bias)
    if isinstance(owner, nn.Embedding):
        return Fp8Embedding(weight.to(device), dtype)
    return None


def _check_entries(module: nn.Module, component: Component, names: Mapping[str, str]) -> None:
    parameters = {names[name]: parameter for name, parameter in module.named_parameters()}
    present = set(component.entries)
    linear_weights = {
        names[f"{path}.weight"]
        for path, owner in module.named_modules()
        if isinstance(owner, nn.Linear)
    }
    wrong = []
    for name in sorted(present & parameters.keys()):
        shape, stored = tuple(parameters[name].shape), component.parts(name)[0]
        if entry_shape(component, name) != shape:
            wrong.append(f"`{name}` is {entry_shape(component, name)} and must be {shape}")
        elif isinstance(stored, NF4Weight):
            if name not in linear_weights:
                wrong.append(f"`{name}` is quantised and does not belong to a linear layer")
        elif not stored.dtype.is_floating_point:
            wrong.append(f"`{name}` is {stored.dtype} and must be a floating-point tensor")
    problems = [
        *_group("missing", (f"`{name}`" for name in sorted(parameters.keys() - present))),
        *_group("unknown", (f"`{name}`" for name in sorted(present - parameters.keys()))),
        *_group("wrong", wrong),
    ]
    if problems:
        raise FormatError(
            f"the {component.kind} in `{component.source}` does not fit together: "
            + "; ".join(problems),
            hint="the file is incomplete or damaged, or it is not FLUX",
        )


def _group(label: str, items: Iterable[str]) -> list[str]:
    items = list(items)
    if not items:
        return []
    shown = ", ".join(islice(items, MAX_NAMES_IN_MESSAGE))
    more = len(items) - MAX_NAMES_IN_MESSAGE
    return [f"{label} ({len(items)}): {shown}" + (f" and {more} more" if more > 0 else "")]
