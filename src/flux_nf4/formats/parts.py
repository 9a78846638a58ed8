"""One part of a model, from whatever holds it: its own file or folder, or a whole checkpoint.

T5, CLIP and VAE files as other tools distribute them have bare names (`encoder.block.0...`,
`text_model...`, `decoder.conv_in...`); inside an all-in-one file they carry prefixes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flux_nf4.errors import FormatError, InputError, ModelNotFoundError
from flux_nf4.formats import folder
from flux_nf4.formats.canonical import read_component, tensors_by_part
from flux_nf4.formats.facts import Facts
from flux_nf4.formats.tensorfile import TensorFile

if TYPE_CHECKING:
    from flux_nf4.formats.component import Component, ComponentKind


def open_part(kind: ComponentKind, path: str | Path) -> Component:
    """Open one part: from its own file, its Diffusers folder, or a checkpoint that has it.

    Raises:
        ModelNotFoundError: nothing is there, or it does not hold this part.
        FormatError: a file is damaged, hostile, or holds something else.
        InputError: the path is empty or a device, or a folder holds two candidates.
    """
    if not str(path) or "\0" in str(path):
        raise InputError(f"the path {str(path)!r} is no path")
    path = Path(path)
    try:
        if not path.is_dir():
            return _open_file(kind, path)
        if not folder.is_diffusers_folder(path):
            return folder.read_part(kind, path)
    except OSError as error:
        raise ModelNotFoundError(f"cannot open `{path}`: {error.strerror or error}") from error
    if not (path / folder.PART_FOLDERS[kind]).is_dir():
        raise ModelNotFoundError(f"`{path}` holds no `{folder.PART_FOLDERS[kind]}`")
    return folder.read_part(kind, path / folder.PART_FOLDERS[kind])


def _open_file(kind: ComponentKind, path: Path) -> Component:
    tensors = tensors_by_part(TensorFile(path), bare=kind).get(kind)
    if tensors is None:
        raise ModelNotFoundError(f"`{path}` holds no {kind}")
    return read_component(kind, tensors, path)


def recorded_facts(component: Component) -> Facts | None:
    """The facts that our writers put into the metadata of a transformer's one file, if they did.

    Raises:
        FormatError: the entry is damaged.
    """
    if len(component.files) != 1:
        return None
    try:
        return Facts.from_metadata(component.files[0].metadata)
    except FormatError as error:
        raise FormatError(f"`{component.source}`: {error.message}", hint=error.hint) from error
