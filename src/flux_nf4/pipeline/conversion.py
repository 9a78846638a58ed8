"""From any checkpoint, or parts of several, to any layout, without losing a bit on the way.

`gather` opens what is to be converted, `plan_conversion` says which files it becomes, and
`Conversion.write` writes them one tensor at a time. Values pass as they are stored: no NF4 weight
is ever expanded on its way to NF4.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from flux_nf4.errors import InputError
from flux_nf4.formats.checkpoint import Checkpoint, has_guidance, open_checkpoint
from flux_nf4.formats.component import COMPONENT_KINDS, Component, ComponentKind
from flux_nf4.formats.facts import FLUX_1_DEV, FLUX_1_SCHNELL, Facts
from flux_nf4.formats.folder import PART_FOLDERS, TOKENIZER_FOLDERS
from flux_nf4.formats.layouts import Naming, plan_part
from flux_nf4.formats.parts import open_part, recorded_facts
from flux_nf4.formats.tensorfile import TensorFile, TensorSource
from flux_nf4.pipeline.conversion_output import Conversion, OutputFile
from flux_nf4.pipeline.diffusers_configs import WEIGHT_FILES, diffusers_texts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flux_nf4.formats.forms import Form
    from flux_nf4.formats.layouts import Quantizer, T5Storage

OutputLayout: TypeAlias = Literal["all-in-one", "transformer-only", "diffusers", "parts"]

_LOGIT_SCALES = ("text_encoders.t5xxl.logit_scale", "text_encoders.clip_l.logit_scale")
_FLUX_1_VOCABULARIES = {
    "shared.weight": 32128,
    "text_model.embeddings.token_embedding.weight": 49408,
}
# What a Diffusers folder's configurations say of a model; the rest stands in the metadata alone.
_CONFIGURED = (
    "clip_eos_token_id",
    "vae_scaling_factor",
    "vae_shift_factor",
    "vae_norm_num_groups",
    "use_dynamic_shifting",
    "shift",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What is to be converted: parts, what is known beside them, and where they come from.

    `metadata_facts` are those that a file of ours should carry: None where FLUX.1's own do.
    """

    components: Mapping[ComponentKind, Component]
    facts: Facts
    metadata_facts: Facts | None
    tokenizer_folders: Mapping[Literal["t5", "clip"], Path]
    extras: Mapping[str, TensorSource] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files and folders that are read."""
        return tuple(component.source for component in self.components.values())

    @property
    def files(self) -> tuple[TensorFile, ...]:
        """The files that are read, open."""
        return tuple(file for part in self.components.values() for file in part.files)


def gather(source: str | None, parts: Mapping[ComponentKind, str]) -> Gathered:
    """Open a checkpoint, and `parts` (kind -> path) that take the place of its own or join them.

    Raises:
        InputError: there is neither a checkpoint nor a transformer.
        ModelNotFoundError, FormatError: as `open_checkpoint` and `open_part`.
    """
    base_path = parts.get("transformer") if source is None else source
    if base_path is None:
        raise InputError(
            "there is no transformer to convert", hint="name a checkpoint, or `--transformer PATH`"
        )
    checkpoint = open_checkpoint(base_path)
    components = dict(checkpoint.components)
    if source is None:
        components = {kind: part for kind, part in components.items() if kind == "transformer"}
    for kind, path in parts.items():
        if (kind, path) != ("transformer", base_path):
            components[kind] = open_part(kind, path)
    if "transformer" not in components:
        raise InputError(
            f"`{base_path}` holds no transformer", hint="add one by `--transformer PATH`"
        )
    recorded = recorded_facts(components["transformer"])
    facts = _merged(recorded, checkpoint) if recorded else checkpoint.facts
    return Gathered(
        components={kind: components[kind] for kind in COMPONENT_KINDS if kind in components},
        facts=facts,
        metadata_facts=facts if recorded or not _is_flux_1(facts, components) else None,
        tokenizer_folders=checkpoint.tokenizer_folders if source is not None else {},
        extras=_logit_scales(checkpoint) if source is not None and not parts else {},
    )


def _merged(recorded: Facts, checkpoint: Checkpoint) -> Facts:
    if checkpoint.layout != "diffusers":
        return recorded
    configured = {name: getattr(checkpoint.facts, name) for name in _CONFIGURED}
    return dataclasses.replace(recorded, **configured)


def _is_flux_1(facts: Facts, components: Mapping[ComponentKind, Component]) -> bool:
    """Whether a reader would come to these facts by itself; names of folders are no facts."""
    default = FLUX_1_DEV if has_guidance(components["transformer"]) else FLUX_1_SCHNELL
    return dataclasses.replace(facts, name=default.name) == default


def _logit_scales(checkpoint: Checkpoint) -> dict[str, TensorSource]:
    """The two scalars that some all-in-one files carry and nothing reads, as they are."""
    if checkpoint.layout != "all-in-one":
        return {}
    file = TensorFile(checkpoint.components["transformer"].source)
    return {
        name: TensorSource(
            dtype=file.infos[name].dtype,
            shape=file.infos[name].shape,
            make=partial(file.tensor, name),
        )
        for name in _LOGIT_SCALES
        if name in file.infos
    }


def plan_conversion(
    gathered: Gathered,
    *,
    layout: OutputLayout,
    form: Form = "keep",
    quantizer: Quantizer | None = None,
    t5: T5Storage = "exact",
) -> Conversion:
    """Which files a layout asks for; `form`, `quantizer` and `t5` are `plan_part`'s.

    Raises:
        FormatError: a part cannot be FLUX's, or a value does not fit.
        ModelNotFoundError: the package holds no tokenizers for a Diffusers folder.
    """
    kinds = [
        kind
        for kind in gathered.components
        if layout != "transformer-only" or kind == "transformer"
    ]
    naming: Naming = "all-in-one" if layout == "transformer-only" else layout
    plans = {
        kind: plan_part(
            kind,
            gathered.components[kind].entries,
            naming=naming,
            form=form,
            quantizer=quantizer,
            t5=t5,
        )
        for kind in kinds
    }
    sources = {kind: plan.sources for kind, plan in plans.items()}
    notes = [note for plan in plans.values() for note in plan.notes]
    texts: dict[str, bytes] = {}
    copies: dict[str, Path] = {}
    if layout == "diffusers":
        has_tokenizers = set(gathered.tokenizer_folders) == {"t5", "clip"}
        texts = diffusers_texts(
            gathered.components, gathered.facts, sources, own_tokenizers=not has_tokenizers
        )
        copies = _tokenizer_copies(gathered) if has_tokenizers else {}
    return Conversion(
        files=_files(gathered, layout, sources),
        texts=texts,
        copies=copies,
        notes=(*notes, *_notes(gathered, layout)),
        sources=gathered.paths,
        inputs=gathered.files,
    )


def _files(
    gathered: Gathered,
    layout: OutputLayout,
    sources: Mapping[ComponentKind, Mapping[str, TensorSource]],
) -> dict[str, OutputFile]:
    """Path -> file of tensors; the metadata are in the transformer's."""
    facts = gathered.metadata_facts
    metadata = facts.to_metadata() if facts else {}
    if layout in ("all-in-one", "transformer-only"):
        joined = {name: source for part in sources.values() for name, source in part.items()}
        if layout == "all-in-one":
            joined.update(gathered.extras)
        return {"": OutputFile(sources=joined, metadata=metadata)}
    files = {}
    for kind, part in sources.items():
        own = metadata if kind == "transformer" else {}
        if layout == "parts":
            files[f"{kind}.safetensors"] = OutputFile(sources=part, metadata=own)
        else:
            name = f"{PART_FOLDERS[kind]}/{WEIGHT_FILES[kind]}"
            files[name] = OutputFile(sources=part, metadata={"format": "pt", **own})
    return files


def _tokenizer_copies(gathered: Gathered) -> dict[str, Path]:
    return {
        f"{TOKENIZER_FOLDERS[kind]}/{file.name}": file
        for kind, folder in gathered.tokenizer_folders.items()
        for file in sorted(folder.iterdir())
        if file.is_file() and file.suffix in (".json", ".txt", ".model")
    }


def _notes(gathered: Gathered, layout: OutputLayout) -> list[str]:
    notes = []
    missing = [kind for kind in COMPONENT_KINDS if kind not in gathered.components]
    if missing and layout in ("all-in-one", "diffusers"):
        notes.append(f"the result lacks {', '.join(missing)}: the source has none")
    if gathered.extras and layout != "all-in-one":
        notes.append("the scalars named `logit_scale` are left out: nothing reads them")
    if layout == "all-in-one" and gathered.tokenizer_folders and not _has_known_tokens(gathered):
        notes.append(
            "a file holds no tokenizers, and these are not FLUX.1's: prompts will be read by "
            f"those that the package has as `{gathered.facts.tokenizer}`"
        )
    return notes


def _has_known_tokens(gathered: Gathered) -> bool:
    if gathered.facts.tokenizer != "flux1":
        return True
    return all(
        part.parts(name)[0].shape[0] == size
        for part in gathered.components.values()
        for name, size in _FLUX_1_VOCABULARIES.items()
        if name in part.entries
    )
