"""Look through a checkpoint for everything that is wrong with it, not only for what is first.

Structure, names, shapes, the JSON of quantised weights, statistics and vectors that are not finite,
and for the two published files their length and hash. The codes of weights are not read but by
the hash: any sixteen values are valid codes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from flux_nf4.errors import FluxNF4Error, FormatError, InputError, ModelNotFoundError
from flux_nf4.formats import folder
from flux_nf4.formats.bnb import check_absmax_is_finite, weight_from_tensors
from flux_nf4.formats.canonical import StoredTensor, drop_embedding_copy
from flux_nf4.formats.component import COMPONENT_KINDS, STORED_AS, Entry
from flux_nf4.formats.facts import Facts
from flux_nf4.formats.keymap import QUANTIZED_KINDS, separate, split_prefix, table_for
from flux_nf4.formats.schema import Shape, expected_shapes
from flux_nf4.formats.tensorfile import TensorFile
from flux_nf4.nf4.codec import NF4Weight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from flux_nf4.formats.component import Component, ComponentKind

_CHUNK_BYTES = 1 << 24

Part: TypeAlias = Literal["file", "transformer", "t5", "clip", "vae"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A published file: what its length and its hash must be."""

    name: str
    num_bytes: int
    sha256: str


# Source: the Hugging Face page of each file.
REFERENCES = (
    Reference(
        name="flux1-dev-bnb-nf4.safetensors",
        num_bytes=11_489_884_113,
        sha256="c5e25d12d720e30a277598ce9ded9db406ee54f63419fe0c801b283d4ea146e2",
    ),
    Reference(
        name="flux1-dev-bnb-nf4-v2.safetensors",
        num_bytes=12_044_280_207,
        sha256="fef37763b8f2c8cc3463139bbb6d91aa517c605b654d4e5c540de52813f30306",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is wrong, and in which part; `hint` says what to do about it."""

    part: Part
    text: str
    hint: str = ""


@dataclass(slots=True, kw_only=True)
class Verification:
    """What was looked at, and every fault that was found."""

    path: Path
    num_bytes: int = 0
    num_tensors: int = 0
    parts: list[ComponentKind] = field(default_factory=list)
    reference: str = ""  # the published file that has this length
    sha256: str = ""
    faults: list[Fault] = field(default_factory=list)

    def add(self, part: Part, text: str, hint: str | None = None) -> None:
        """Note a fault."""
        self.faults.append(Fault(part=part, text=text, hint=hint or ""))


def verify(
    path: str | Path,
    *,
    with_sha256: bool = False,
    on_bytes: Callable[[int], None] = lambda _num_bytes: None,
) -> Verification:
    """Look through a file, a Diffusers folder, or the one file of a folder.

    `on_bytes` hears of what was read.

    Raises:
        ModelNotFoundError: nothing is there.
        FormatError: a folder whose `config.json` is damaged, so that nothing tells what it holds.
        InputError: the path is empty or a device, a hash is asked of a folder, or a folder holds
            several files that may be meant.
    """
    if not str(path) or "\0" in str(path):
        raise InputError(f"the path {str(path)!r} is no path")
    path = Path(path)
    try:
        if not path.exists():
            raise ModelNotFoundError(f"there is no model at `{path}`")
        if path.is_dir() and with_sha256:
            raise InputError(f"`{path}` is a folder, and has no hash", hint="name one of its files")
        if path.is_dir() and not (folder.is_diffusers_folder(path) or folder.is_part_folder(path)):
            path = folder.lone_file(path)
        is_folder = path.is_dir()
    except OSError as error:
        raise ModelNotFoundError(f"cannot open `{path}`: {error.strerror or error}") from error
    found = Verification(path=path)
    if is_folder:
        _verify_folder(found, on_bytes)
        return found
    if not path.is_file():
        raise InputError(f"`{path}` is not a regular file")
    found.num_bytes = path.stat().st_size
    _verify_file(found, on_bytes)
    _verify_reference(found, on_bytes if with_sha256 else None)
    return found


def _verify_folder(found: Verification, on_bytes: Callable[[int], None]) -> None:
    is_diffusers = folder.is_diffusers_folder(found.path)
    places = {
        kind: found.path / name if is_diffusers else found.path
        for kind, name in folder.PART_FOLDERS.items()
        if (found.path / name).is_dir() or (kind == "transformer" and not is_diffusers)
    }
    for kind, place in places.items():
        try:
            component = folder.read_part(kind, place)
        except FluxNF4Error as error:
            found.add(kind, error.message, error.hint)
            continue
        except OSError as error:
            found.add(kind, f"cannot read `{place}`: {error.strerror or error}")
            continue
        found.parts.append(kind)
        found.num_bytes += component.num_bytes
        _verify_component(found, component, on_bytes)
    if is_diffusers and "transformer" not in places:
        found.add("file", f"`{found.path}` holds no transformer")


def _verify_component(
    found: Verification, component: Component, on_bytes: Callable[[int], None]
) -> None:
    shapes: dict[str, Shape] = {}
    for name in component.entries:
        parts = component.parts(name)
        found.num_tensors += len(parts)
        shapes[name] = _joined_shape([tuple(part.shape) for part in parts])
        for part in parts:
            _verify_values(found, component.kind, name, part, on_bytes)
    _verify_shapes(found, component.kind, shapes)


def _verify_file(found: Verification, on_bytes: Callable[[int], None]) -> None:
    try:
        file = TensorFile(found.path)
    except FormatError as error:
        found.add("file", error.message, error.hint)
        return
    found.num_tensors = len(file.names)
    try:
        Facts.from_metadata(file.metadata)
    except FormatError as error:
        found.add("file", error.message, error.hint)
    groups = _groups(found, file)
    if not groups:
        found.add("file", f"`{found.path}` holds no tensors")
    for kind in COMPONENT_KINDS:
        if kind in groups:
            found.parts.append(kind)
            _verify_part(found, kind, groups[kind], on_bytes)


def _groups(found: Verification, file: TensorFile) -> dict[ComponentKind, dict[str, StoredTensor]]:
    bare = _kind_of_bare_names(file.names)
    groups: dict[ComponentKind, dict[str, StoredTensor]] = {}
    for full_name in file.names:
        kind, name = split_prefix(full_name, bare)
        group = groups.setdefault(kind, {})
        if name in group:
            found.add(kind, f"`{full_name}` and `{group[name].name}` are one tensor twice")
        group[name] = StoredTensor(file, full_name)
    return groups


def _kind_of_bare_names(names: Iterable[str]) -> ComponentKind:
    """Which part a file without prefixes holds: a name that only this part has tells."""
    marks: dict[str, ComponentKind] = {
        "encoder.block.": "t5",
        "text_model.": "clip",
        "encoder.layers.": "clip",
        "decoder.conv_in.": "vae",
    }
    telling = (kind for name in names for mark, kind in marks.items() if name.startswith(mark))
    return next(telling, "transformer")


def _verify_part(
    found: Verification,
    kind: ComponentKind,
    tensors: Mapping[str, StoredTensor],
    on_bytes: Callable[[int], None],
) -> None:
    plain, companions = _separate(found, kind, tensors)
    table = table_for(kind, plain)
    inverse = table.inverse()
    for name in sorted(plain.keys() - inverse.keys()):
        found.add(kind, f"`{plain[name].name}` is unknown: no FLUX {kind} has it")
    present = {inverse[name][0] for name in plain.keys() & inverse.keys()}
    required = table.required(present)
    needed = {name for canonical in required for name in table.names[canonical]}
    for name in sorted(needed - plain.keys() - companions.keys()):
        found.add(kind, f"`{name}` is missing", "get the file again")
    entries = {
        name: _verify_entry(found, kind, plain[name], companions.get(name, {}))
        for name in plain.keys() & inverse.keys()
    }
    for name, entry in entries.items():
        if entry is not None:
            _verify_values(found, kind, name, entry, on_bytes)
    shapes: dict[str, Shape] = {}
    for canonical in sorted(present):
        parts = [entries.get(name) for name in table.names[canonical]]
        good = [tuple(part.shape) for part in parts if part is not None]
        if len(good) == len(parts):
            shapes[canonical] = _joined_shape(good)
    _verify_shapes(found, kind, shapes, ignored=required | present)


def _separate(
    found: Verification, kind: ComponentKind, tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], dict[str, dict[str, StoredTensor]]]:
    """Weights, and the statistics of those that are quantised."""
    plain, companions = separate(kind, tensors)
    if kind == "t5":
        try:
            drop_embedding_copy(plain, found.path)
        except FormatError as error:
            found.add(kind, error.message, error.hint)
    for name in sorted(companions.keys() - plain.keys()):
        found.add(kind, f"`{name}` is missing, and its quantisation statistics are there")
    return plain, companions


def _verify_entry(
    found: Verification,
    kind: ComponentKind,
    stored: StoredTensor,
    companions: Mapping[str, StoredTensor],
) -> Entry | None:
    tensor = stored.read()
    if not companions:
        if tensor.dtype not in STORED_AS:
            found.add(kind, f"`{stored.name}` is {tensor.dtype} and has no statistics beside it")
            return None
        return tensor
    if kind not in QUANTIZED_KINDS:
        found.add(
            kind, f"`{stored.name}` is quantised, which is read in the transformer and T5 only"
        )
        return None
    try:
        return weight_from_tensors(
            stored.name, tensor, {suffix: each.read() for suffix, each in companions.items()}
        )
    except FormatError as error:
        found.add(kind, error.message, error.hint)
        return None


def _verify_values(
    found: Verification,
    kind: ComponentKind,
    name: str,
    entry: Entry,
    on_bytes: Callable[[int], None],
) -> None:
    if isinstance(entry, NF4Weight):
        on_bytes(entry.num_bytes - entry.codes.nbytes)
        try:
            check_absmax_is_finite(name, entry)
        except FormatError as error:
            found.add(kind, error.message, error.hint)
    elif entry.dim() < 2:
        on_bytes(entry.nbytes)
        if not torch.isfinite(entry.float()).all():
            found.add(kind, f"`{name}` holds NaN or infinity", "get the file again")


def _joined_shape(shapes: list[Shape]) -> Shape:
    """The shape of rows that are stored apart."""
    first = shapes[0]
    if len(shapes) == 1 or not first:
        return first
    return (sum(shape[0] if shape else 0 for shape in shapes), *first[1:])


def _verify_shapes(
    found: Verification,
    kind: ComponentKind,
    shapes: Mapping[str, Shape],
    *,
    ignored: Iterable[str] = (),
) -> None:
    """Compare with what the sizes ask for; names in `ignored` have been spoken of."""
    if kind == "vae":
        shapes = {
            # BFL's attention is 1x1 convolutions, Diffusers' linear: the same numbers.
            name: shape[:2] if "attentions" in name and shape[2:] == (1, 1) else shape
            for name, shape in shapes.items()
        }
    try:
        expected = expected_shapes(kind, shapes)
    except FormatError as error:
        found.add(kind, f"no shape was compared: {error.message}", error.hint)
        return
    for name in sorted(expected.keys() & shapes.keys()):
        if shapes[name] != expected[name]:
            found.add(
                kind,
                f"`{name}` has the shape {list(shapes[name])}, and must have "
                f"{list(expected[name])}",
            )
    for name in sorted(expected.keys() - shapes.keys() - set(ignored)):
        found.add(kind, f"`{name}` is missing")
    for name in sorted(shapes.keys() - expected.keys()):
        found.add(kind, f"`{name}` has no place in a {kind} of these sizes")


def _verify_reference(found: Verification, on_bytes: Callable[[int], None] | None) -> None:
    by_length = {each.num_bytes: each for each in REFERENCES}
    by_name = {each.name: each for each in REFERENCES}
    reference = by_length.get(found.num_bytes)
    named = by_name.get(found.path.name)
    if named is not None and named is not reference:
        found.add(
            "file",
            f"`{found.path}` has {found.num_bytes:,} bytes; the published file of this name has "
            f"{named.num_bytes:,}",
            "get it again, unless you made it yourself",
        )
    found.reference = reference.name if reference else ""
    if on_bytes is None:
        return
    try:
        found.sha256 = file_sha256(found.path, on_bytes)
    except OSError as error:
        raise ModelNotFoundError(f"cannot read `{found.path}`: {error.strerror}") from error
    if reference is not None and found.sha256 != reference.sha256:
        found.add(
            "file",
            f"the sha256 is {found.sha256}; that of {reference.name} is {reference.sha256}",
            "the file is damaged, or another of this length: get it again",
        )


def file_sha256(path: Path, on_bytes: Callable[[int], None] = lambda _num_bytes: None) -> str:
    """The sha256 of a file; `on_bytes` hears of what was read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            on_bytes(len(chunk))
    return digest.hexdigest()
