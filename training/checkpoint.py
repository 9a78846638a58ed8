"""What a training run leaves on disk, so that the next run goes on where it stopped.

In the state folder:

    autoencoder.state, transformer.state     masters, averages, momentum (float32), progress
    weights/*.safetensors                    averages as they ship or are evaluated
    journal.json                             progress, histories, results: small, for people

Every file is written beside its place and renamed: a run that is killed leaves the old one. The
two `.state` files may be missing (another machine, say): the run then goes on from `weights/` and
`journal.json`, with the momentum lost.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

PROGRESS_KEY = "progress"


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a run stands: its stage, and how much of the stage is done."""

    stage: str
    step: int = 0
    seconds: float = 0.0  # spent training in this stage, over all runs


@dataclass(slots=True)
class Journal:
    """Progress, histories and results of the whole plan; saved as JSON."""

    path: Path
    progress: Progress
    history: dict[str, list[list[float]]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, first_stage: str) -> Journal:
        """Read a journal, or begin one."""
        if not path.exists():
            return cls(path, Progress(stage=first_stage))
        values = json.loads(path.read_text())
        progress = Progress(**values.pop("progress"))
        return cls(path, progress, **values)

    def save(self) -> None:
        """Write it, whole or not at all."""
        values = {
            "progress": asdict(self.progress),
            "history": self.history,
            "results": self.results,
            "facts": self.facts,
        }
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(values, indent=1) + "\n")
        temporary.replace(self.path)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors of any device, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata
    )
    temporary.replace(path)


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read what `save_tensors` wrote."""
    return load_file(path, device=str(device))


def save_state(path: Path, tensors: Mapping[str, Tensor], progress: Progress) -> None:
    """Write a training state and its progress as one file."""
    save_tensors(path, tensors, {PROGRESS_KEY: json.dumps(asdict(progress))})


def state_progress(path: Path) -> Progress | None:
    """The progress of a saved state; None where there is none."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        return Progress(**json.loads(file.metadata()[PROGRESS_KEY]))


def part_of(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one part of a file that holds several, without the part's name."""
    prefix = f"{name}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
