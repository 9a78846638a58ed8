"""A model file or folder under `doctor`'s eyes: what it is, what it lacks, what looks wrong."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from flux_nf4.cli.findings import Finding, num_bytes_text
from flux_nf4.cli.machine import disk_finding, leftover_findings
from flux_nf4.errors import FluxNF4Error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flux_nf4.formats.checkpoint import Checkpoint

PART_NAMES = {
    "transformer": "transformer",
    "t5": "T5 encoder",
    "clip": "CLIP encoder",
    "vae": "VAE",
}


def model_findings(path: Path | None) -> Iterator[Finding]:
    """Everything about the model at `path`; None: the built-in demo model."""
    from flux_nf4.formats.checkpoint import open_checkpoint
    from flux_nf4.pipeline.load import demo_path

    try:
        checkpoint = open_checkpoint(demo_path() if path is None else path)
    except FluxNF4Error as error:
        yield Finding(
            severity="problem", topic="model", text=error.message, remedy=error.hint or ""
        )
    else:
        yield from checkpoint_findings(checkpoint, is_demo=path is None)
    if path is not None:
        with contextlib.suppress(OSError):  # what cannot be looked at could not be opened either
            folder = path if path.is_dir() else path.parent
            if folder.is_dir():
                yield from leftover_findings(folder)
                yield disk_finding(folder, "the model")


def checkpoint_findings(checkpoint: Checkpoint, *, is_demo: bool) -> Iterator[Finding]:
    """What a checkpoint that could be opened is, and what it lacks."""
    name = "the built-in demo model" if is_demo else f"`{checkpoint.path}`"
    num_bytes = sum(component.num_bytes for component in checkpoint.components.values())
    yield Finding(
        severity="ok",
        topic="model",
        text=f"{name}: FLUX.1 {checkpoint.variant}, {checkpoint.layout}, "
        f"{checkpoint.quantization}, {num_bytes_text(num_bytes)}",
    )
    yield from _quantization_findings(checkpoint)
    if checkpoint.missing:
        lacking = ", ".join(PART_NAMES[kind] for kind in checkpoint.missing)
        yield Finding(
            severity="problem",
            topic="model",
            text=f"it lacks parts that an image needs: {lacking}",
            remedy="use an all-in-one file (flux1-dev-bnb-nf4-v2.safetensors) or a Diffusers "
            "folder, which hold all four",
        )
    if checkpoint.variant not in ("dev", "schnell"):
        yield Finding(
            severity="warning",
            topic="model",
            text=f"FLUX.1 {checkpoint.variant} edits an image, which is not supported yet",
            remedy="use FLUX.1-dev, FLUX.1-schnell, or a model made from them",
        )
    for note in checkpoint.notes:
        yield Finding(severity="note", topic="model", text=note)


def _quantization_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    transformer = checkpoint.components.get("transformer")
    if transformer is None:
        return
    forms = transformer.summary(matrices_only=True)
    if any(form.startswith("nf4") for form in forms) and any(
        form.startswith("fp8") for form in forms
    ):
        stored = ", ".join(f"{each.num_tensors} {form}" for form, each in forms.items())
        yield Finding(
            severity="problem",
            topic="model",
            text=f"its transformer mixes fp8 with NF4 ({stored}): a merge or conversion went wrong",
            remedy="download the file again, or convert once more from the bf16 weights",
        )
    elif "nf4 v1" in forms:
        yield Finding(
            severity="note",
            topic="model",
            text="NF4 v1: its block scales are quantised too; as good as v2 and smaller, a little "
            "slower to load",
        )
    t5 = checkpoint.components.get("t5")
    if t5 is not None and any(form.startswith("fp8") for form in t5.summary()):
        yield Finding(
            severity="ok",
            topic="model",
            text="T5 is stored in fp8, as in the all-in-one files: that is normal beside NF4",
        )
