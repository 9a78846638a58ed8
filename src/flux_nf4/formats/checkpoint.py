"""Open any FLUX checkpoint that people have, and give its tensors canonical names.

All-in-one files (as other tools distribute FLUX.1-dev in NF4), files with the transformer alone,
Diffusers folders, and a folder that holds one such file. Opening reads headers and the small JSON
texts of quantised weights; the weights themselves stay on the disk until somebody reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from flux_nf4.errors import FormatError, InputError, ModelNotFoundError
from flux_nf4.formats import folder
from flux_nf4.formats.canonical import list_names, read_component, tensors_by_part
from flux_nf4.formats.component import COMPONENT_KINDS, Component, ComponentKind
from flux_nf4.formats.facts import FLUX_1_DEV, FLUX_1_SCHNELL, Facts
from flux_nf4.formats.keymap import variant_name
from flux_nf4.formats.parts import recorded_facts
from flux_nf4.formats.tensorfile import TensorFile

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

Layout: TypeAlias = Literal["all-in-one", "transformer-only", "diffusers"]

_PART_NAMES: dict[ComponentKind, str] = {
    "transformer": "the transformer",
    "t5": "the T5 text encoder",
    "clip": "the CLIP text encoder",
    "vae": "the VAE",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint, opened: every tensor under its canonical name, still on disk until read.

    `tokenizer_folders` has what a Diffusers folder brings along; `notes` are worth telling a user.
    """

    path: Path
    layout: Layout
    components: Mapping[ComponentKind, Component]
    facts: Facts
    tokenizer_folders: Mapping[Literal["t5", "clip"], Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[ComponentKind, ...]:
        """The parts that an image needs and this checkpoint does not hold."""
        return tuple(kind for kind in COMPONENT_KINDS if kind not in self.components)

    @property
    def quantization(self) -> str:
        """How the matrices of the transformer are stored.

        `bf16`, `fp16`, `fp32`, `fp8`, `nf4 v1`, `nf4 v2`, `fp4`; `mixed: nf4 v2, bf16` for
        several, the most bytes first; `none` without a transformer.
        """
        transformer = self.components.get("transformer")
        labels = list(transformer.summary(matrices_only=True)) if transformer else ["none"]
        return labels[0] if len(labels) == 1 else f"mixed: {', '.join(labels)}"

    @property
    def variant(self) -> str:
        """Which FLUX.1 this is, by its names and shapes.

        `dev` (also Krea, Kontext and prunings, which names and widths do not tell apart),
        `schnell`, `fill`, `canny/depth`; `unknown (N input channels)`, or `none`.
        """
        transformer = self.components.get("transformer")
        if transformer is None:
            return "none"
        # The shape of the weight itself: that of its packed bytes ends in 1, whatever the model.
        num_channels = transformer.parts("img_in.weight")[0].shape[-1]
        return variant_name(num_channels, guidance=has_guidance(transformer))

    def require_complete(self) -> None:
        """Check that every part is there that an image needs.

        Raises:
            ModelNotFoundError: parts are missing; the message names them.
        """
        if not self.missing:
            return
        here, absent = _enumerate_parts(self.components), _enumerate_parts(self.missing)
        raise ModelNotFoundError(
            f"`{self.path}` holds only {here}; an image also needs {absent}",
            hint="use an all-in-one file, such as flux1-dev-bnb-nf4-v2.safetensors, "
            "or a Diffusers folder; `flux-nf4 convert` makes both from files of parts",
        )


def _enumerate_parts(kinds: Collection[ComponentKind]) -> str:
    names = [_PART_NAMES[kind] for kind in COMPONENT_KINDS if kind in kinds]
    if len(names) < 2:
        return "".join(names) or "nothing"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def has_guidance(transformer: Component) -> bool:
    """Whether a transformer embeds the distilled guidance scale (dev does, schnell does not)."""
    return "guidance_in.in_layer.weight" in transformer.entries


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint: a file, a Diffusers folder, or a folder that holds one such file.

    Promises that every name was known and none was missing or doubled within the parts that are
    there; which parts are not there, `missing` says.

    Raises:
        ModelNotFoundError: nothing is there, or nothing that can be read.
        FormatError: a file is damaged, hostile, or no FLUX.1 checkpoint.
        InputError: the path is empty or a device, or a folder holds two candidates.
    """
    if not str(path) or "\0" in str(path):
        raise InputError(f"the model path {str(path)!r} is no path")
    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path)
        exists = path.exists()
    except OSError as error:
        raise ModelNotFoundError(f"cannot open `{path}`: {error.strerror or error}") from error
    if not exists:
        raise ModelNotFoundError(
            f"there is no model at `{path}`",
            hint="give the path of a .safetensors file or of a Diffusers folder on this machine: "
            "nothing is downloaded",
        )
    return _open_file(path)


def _open_folder(path: Path) -> Checkpoint:
    if folder.is_diffusers_folder(path):
        return _open_diffusers_folder(path)
    if folder.is_part_folder(path):
        transformer = folder.read_part("transformer", path)
        return Checkpoint(
            path=path,
            layout="transformer-only",
            components={"transformer": transformer},
            facts=_default_facts(transformer),
        )
    return _open_file(folder.lone_file(path))


def _open_diffusers_folder(path: Path) -> Checkpoint:
    components = folder.read_parts(path)
    transformer = components.get("transformer")
    facts = folder.read_facts(
        path,
        has_guidance=transformer is None or has_guidance(transformer),
        hidden_size=transformer.parts("img_in.weight")[0].shape[0] if transformer else 0,
    )
    ignored = sorted(file.name for file in path.glob("*.safetensors"))
    notes = (f"not used, as the folder is complete without: {list_names(ignored)}",)
    return Checkpoint(
        path=path,
        layout="diffusers",
        components=components,
        facts=facts,
        tokenizer_folders=folder.tokenizer_folders(path),
        notes=notes if ignored else (),
    )


def _open_file(path: Path) -> Checkpoint:
    file = TensorFile(path)
    groups = tensors_by_part(file)
    if not groups.get("transformer"):
        raise FormatError(
            f"`{path}` holds no FLUX transformer: {list_names(file.names) or 'it is empty'}",
            hint="give an all-in-one file, a transformer, or a Diffusers folder",
        )
    components = {
        kind: read_component(kind, groups[kind], path) for kind in COMPONENT_KINDS if kind in groups
    }
    transformer = components["transformer"]
    return Checkpoint(
        path=path,
        layout="all-in-one" if len(components) > 1 else "transformer-only",
        components=components,
        facts=recorded_facts(transformer) or _default_facts(transformer),
    )


def _default_facts(transformer: Component) -> Facts:
    return FLUX_1_DEV if has_guidance(transformer) else FLUX_1_SCHNELL
