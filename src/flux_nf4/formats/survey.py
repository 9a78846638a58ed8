"""What a checkpoint holds, for telling: the parts, how they are stored, and how many bytes.

A single file without oddities is surveyed from its header alone, and without torch, whose import
takes longer than all the rest. Everything else is opened as `checkpoint` opens it, and so are files
with something wrong, for its errors. Of a sound file both ways tell the same; a test holds them to
it. What the quick way does not read (tables, statistics) is for `verification`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_nf4.errors import FluxNF4Error
from flux_nf4.formats.facts import FLUX_1_DEV, FLUX_1_SCHNELL, Facts
from flux_nf4.formats.headerfile import OpenedHeader, open_header
from flux_nf4.formats.keymap import (
    MAX_STATE_BYTES,
    QUANTIZED_KINDS,
    STATE_PREFIX,
    T5_EMBEDDING_COPY,
    Kind,
    separate,
    split_prefix,
    table_for,
    variant_name,
)
from flux_nf4.formats.strictjson import parse_json

if TYPE_CHECKING:
    from flux_nf4.formats.checkpoint import Checkpoint
    from flux_nf4.formats.header import TensorInfo

_KINDS: tuple[Kind, ...] = ("transformer", "t5", "clip", "vae")
_LABELS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "F8_E4M3": "fp8", "F8_E5M2": "fp8 e5m2"}
_PLAIN_STATISTICS = {"absmax": "F32", "quant_map": "F32"}
_NESTED_STATISTICS = {
    "absmax": "U8",
    "quant_map": "F32",
    "nested_absmax": "F32",
    "nested_quant_map": "F32",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyedPart:
    """One part: where it is, and how it is stored -> (tensors, bytes), the most bytes first."""

    source: Path
    stored: Mapping[str, tuple[int, int]]

    @property
    def num_bytes(self) -> int:
        """How many bytes its entries take."""
        return sum(num_bytes for _, num_bytes in self.stored.values())


# Names and widths are those of dev, or of each other.
_TOLD_BY_NAME = ("Kontext", "Krea", "Canny", "Depth")


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What `checkpoint.Checkpoint` tells of itself, without its tensors."""

    path: Path
    layout: str
    variant: str
    quantization: str
    parts: Mapping[str, SurveyedPart]
    facts: Facts
    notes: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """The parts that an image needs and this checkpoint does not hold."""
        return tuple(kind for kind in _KINDS if kind not in self.parts)

    @property
    def told_by_name(self) -> str | None:
        """Which model its name says it is, of those whose tensors do not tell; or None."""
        name = self.path.resolve().name.lower()
        return next((each for each in _TOLD_BY_NAME if each.lower() in name), None)


def survey(path: str | Path) -> Survey:
    """Look at a file or folder.

    Raises:
        ModelNotFoundError, FormatError, InputError: as `checkpoint.open_checkpoint`.
    """
    try:
        found = _survey_file(Path(path))
    except (FluxNF4Error, OSError, ValueError):
        found = None
    if found is not None:
        return found
    from flux_nf4.formats.checkpoint import open_checkpoint

    return _from_checkpoint(open_checkpoint(path))


def _from_checkpoint(checkpoint: Checkpoint) -> Survey:
    return Survey(
        path=checkpoint.path,
        layout=checkpoint.layout,
        variant=checkpoint.variant,
        quantization=checkpoint.quantization,
        parts={
            kind: SurveyedPart(
                source=component.source,
                stored={
                    form: (stored.num_tensors, stored.num_bytes)
                    for form, stored in component.summary().items()
                },
            )
            for kind, component in checkpoint.components.items()
        },
        facts=checkpoint.facts,
        notes=checkpoint.notes,
    )


def _odd(what: str) -> FluxNF4Error:
    """Something that the quick way does not decide; `checkpoint` finds its own words for it."""
    return FluxNF4Error(f"not plain: {what}")


def _survey_file(path: Path) -> Survey | None:
    if not path.is_file():
        return None
    with open_header(path) as opened:
        groups = _groups(opened.header.infos)
        if "transformer" not in groups:
            return None
        forms = {
            kind: list(_forms(kind, groups[kind], opened)) for kind in _KINDS if kind in groups
        }
        transformer = groups["transformer"]
        guidance = any("guidance" in name for name in transformer)
        num_channels = _num_channels(transformer, opened)
    matrices = [(label, size) for label, size, num_axes in forms["transformer"] if num_axes == 2]
    labels = list(_add_up(matrices))
    return Survey(
        path=path,
        layout="all-in-one" if len(groups) > 1 else "transformer-only",
        variant=variant_name(num_channels, guidance=guidance),
        quantization=labels[0] if len(labels) == 1 else f"mixed: {', '.join(labels)}",
        parts={
            kind: SurveyedPart(
                source=path, stored=_add_up([(label, size) for label, size, _ in found])
            )
            for kind, found in forms.items()
        },
        facts=Facts.from_metadata(opened.header.metadata)
        or (FLUX_1_DEV if guidance else FLUX_1_SCHNELL),
    )


def _groups(infos: Mapping[str, TensorInfo]) -> dict[Kind, dict[str, TensorInfo]]:
    groups: dict[Kind, dict[str, TensorInfo]] = {}
    for full_name, info in infos.items():
        kind, name = split_prefix(full_name)
        group = groups.setdefault(kind, {})
        if name in group or name == T5_EMBEDDING_COPY:
            raise _odd(full_name)
        group[name] = info
    return groups


def _forms(
    kind: Kind, infos: Mapping[str, TensorInfo], opened: OpenedHeader
) -> Iterator[tuple[str, int, int]]:
    """How each entry of a part is stored, its bytes, and how many axes it has."""
    plain, companions = separate(kind, infos)
    _check_plain(kind, plain, companions)
    for name, info in plain.items():
        if name in companions:
            yield _quantized(info, companions[name], opened)
        elif info.dtype_name in _LABELS and info.shape:
            yield _LABELS[info.dtype_name], info.num_bytes, len(info.shape)
        else:
            raise _odd(name)


def _check_plain(
    kind: str,
    plain: Mapping[str, TensorInfo],
    companions: Mapping[str, Mapping[str, TensorInfo]],
) -> None:
    table = table_for(kind, plain)
    inverse = table.inverse()
    if plain.keys() - inverse.keys() or companions.keys() - plain.keys():
        raise _odd("unknown names")
    if any(len(names) > 1 for names in table.names.values()):
        raise _odd("weights in pieces")
    required = table.required({inverse[name][0] for name in plain})
    if {name for each in required for name in table.names[each]} - plain.keys():
        raise _odd("missing names")
    if companions and kind not in QUANTIZED_KINDS:
        raise _odd(f"a quantised {kind}")


def _quantized(
    codes: TensorInfo, companions: Mapping[str, TensorInfo], opened: OpenedHeader
) -> tuple[str, int, int]:
    state = _state(companions, opened)
    statistics = {
        suffix: info.dtype_name
        for suffix, info in companions.items()
        if not suffix.startswith(STATE_PREFIX)
    }
    is_nested = "nested_blocksize" in state
    if statistics != (_NESTED_STATISTICS if is_nested else _PLAIN_STATISTICS):
        raise _odd("statistics")
    num_values = math.prod(state["shape"])
    if codes.dtype_name != "U8" or codes.shape != (num_values // 2, 1):
        raise _odd("codes")
    num_blocks, rest = divmod(num_values, state["blocksize"])
    if rest or companions["absmax"].shape != (num_blocks,):
        raise _odd("absmax")
    counted = ("absmax", "nested_absmax", "nested_quant_map") if is_nested else ("absmax",)
    num_bytes = codes.num_bytes + sum(companions[suffix].num_bytes for suffix in counted)
    if state["quant_type"] == "fp4":
        return "fp4", num_bytes, 2
    return "nf4 v1" if is_nested else "nf4 v2", num_bytes, 2


def _state(companions: Mapping[str, TensorInfo], opened: OpenedHeader) -> dict[str, Any]:
    """The JSON text of a weight; whatever is wrong with it is `checkpoint`'s to say."""
    (suffix,) = [suffix for suffix in companions if suffix.startswith(STATE_PREFIX)]
    info = companions[suffix]
    if info.num_bytes > MAX_STATE_BYTES:
        raise _odd(suffix)
    os.lseek(opened.descriptor, opened.data_start + info.start, os.SEEK_SET)
    data = os.read(opened.descriptor, info.num_bytes)
    state = parse_json(data, suffix)
    if not isinstance(state, dict) or not isinstance(state.get("shape"), list):
        raise _odd(suffix)
    sizes = (*state["shape"], state.get("blocksize"))
    if len(sizes) != 3 or any(type(size) is not int or size < 1 for size in sizes):
        raise _odd(suffix)
    if state.get("quant_type") != suffix.removeprefix(STATE_PREFIX):
        raise _odd(suffix)
    return state


def _num_channels(transformer: Mapping[str, TensorInfo], opened: OpenedHeader) -> int:
    name = "img_in.weight"
    companions = {
        each.removeprefix(f"{name}."): info
        for each, info in transformer.items()
        if each.startswith(f"{name}.")
    }
    shape = _state(companions, opened)["shape"] if companions else transformer[name].shape
    return int(shape[-1])


def _add_up(pieces: list[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    totals: dict[str, tuple[int, int]] = {}
    for label, size in pieces:
        count, num_bytes = totals.get(label, (0, 0))
        totals[label] = (count + 1, num_bytes + size)
    return dict(sorted(totals.items(), key=lambda item: (-item[1][1], item[0])))
