"""Begin a plan from a finished model: an all-in-one file in place of what was trained before.

The file's parts are laid out in the state folder as if a run had come this far elsewhere: the VAE
done, its facts known, T5, CLIP and the transformer as what the flow stage goes on from, with new
momentum. Everything after that is as in any other resumed run.

The transformer of such a file may be a student of guidance distillation: its guidance input means
something. The flow stage holds that input at 1, where distillation has it at its weakest; the
network is soon an ordinary one again at 1, and what it does elsewhere is distilled anew later.

With other text encoders a transformer would have to learn to listen anew: it starts from nothing,
and the VAE alone is taken over. Unless those encoders were trained to be understood by it and bring
its text layers along (`training.train_text --listener`): then it goes on with these in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.nf4.codec import NF4Weight
from flux_nf4.nf4.reference import dequantize
from training.checkpoint import Journal, Progress, load_tensors, part_of, save_tensors
from training.stage import weights_path

if TYPE_CHECKING:
    from pathlib import Path

    from flux_nf4.formats.component import Component, ComponentKind

# What each part is called in the state folder.
PARTS: dict[ComponentKind, str] = {
    "transformer": "flow",
    "t5": "t5",
    "clip": "clip",
    "vae": "autoencoder",
}


def tensors_of(component: Component) -> dict[str, Tensor]:
    """A part's weights: bfloat16, but the scales of QK norms and CLIP, which are finer, float32."""
    tensors = {}
    for name, entry in component.entries.items():
        tensor = dequantize(entry) if isinstance(entry, NF4Weight) else entry
        is_fine = tensor.dtype in (torch.float32, torch.float16)
        tensors[name] = tensor.to(torch.float32 if is_fine else torch.bfloat16)
    return tensors


def warm_start(file: Path, state: Path, *, text: Path | None = None) -> bool:
    """Lay the parts of an all-in-one file out in a state folder; False if a plan has begun there.

    `text` holds the encoders of `training.train_text`, to go with the file's VAE.

    Raises:
        FormatError: the file is damaged; its message says how.
        ModelNotFoundError: there is no such file, or a part is missing in it.
    """
    if (state / "journal.json").exists():
        return False
    checkpoint = open_checkpoint(file)
    checkpoint.require_complete()
    parts = {name: tensors_of(checkpoint.components[kind]) for kind, name in PARTS.items()}
    if text is not None:
        tensors = load_tensors(text)
        parts |= {name: part_of(tensors, name) for name in ("t5", "clip")}
        ears = part_of(tensors, "transformer")
        if ears:
            parts["flow"] |= ears
        else:
            del parts["flow"]
    for name, tensors in parts.items():
        save_tensors(weights_path(state, name), tensors)
    autoencoder = Journal.open(state / "autoencoder.json", "autoencoder")
    facts = checkpoint.facts
    autoencoder.facts = {
        "vae_scaling_factor": facts.vae_scaling_factor,
        "vae_shift_factor": facts.vae_shift_factor,
        "vae_norm_num_groups": facts.vae_norm_num_groups,
    }
    autoencoder.progress = Progress(stage="done")
    autoencoder.save()
    journal = Journal.open(state / "journal.json", "flow")
    journal.facts["init"] = file.name
    # Last: only now the folder holds a plan.
    journal.save()
    return True
