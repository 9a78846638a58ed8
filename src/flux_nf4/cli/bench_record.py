"""A measurement as one line of JSON: on what, with what, by which commit, and what came out.

Lines are appended to `.jsonl` files and read by `benchmarks/waterfall.py`. Times are in seconds,
memory in bytes; what was not measured is null.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_nf4 import __version__
from flux_nf4.cli.accelerators import inspect_torch, nvidia_driver
from flux_nf4.cli.machine import processor_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flux_nf4.pipeline.benchmark import Measurement
    from flux_nf4.pipeline.peers import PeerMeasurement

SCHEMA = 1
_PACKAGES = ("torch", "triton", "diffusers", "bitsandbytes", "transformers")


def environment(device_type: str, index: int = 0) -> dict[str, Any]:
    """What a measurement depends on beside its settings."""
    torch = inspect_torch()
    device: dict[str, Any] = {"type": device_type, "name": processor_name()}
    if device_type == "cuda":
        card = torch.cards[index]
        device |= {"name": card.name, "memory_bytes": card.total, "capability": card.capability}
        device["driver"] = nvidia_driver()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device,
        "versions": {
            "flux_nf4": __version__,
            "python": platform.python_version(),
            "cuda": torch.cuda,
            **{name: _version(name) for name in _PACKAGES},
        },
    }


def drawing_record(name: str, load_s: float, measured: Measurement) -> dict[str, Any]:
    """Our own line: steps, the cold and the fastest warm request, memory, ceilings."""
    return {
        "schema": SCHEMA,
        "kind": "drawing",
        "name": name,
        "load_s": load_s,
        **dataclasses.asdict(measured),
        "error": None,
    }


def peer_record(peer: PeerMeasurement) -> dict[str, Any]:
    """A peer's line."""
    return {
        "schema": SCHEMA,
        "kind": "peer",
        "name": peer.name,
        "step": None if peer.step is None else dataclasses.asdict(peer.step),
        "peak": None if peer.peak is None else dataclasses.asdict(peer.peak),
        "error": peer.error,
    }


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to a file.

    Raises:
        DiskError: it could not be written.
    """
    from flux_nf4.formats.atomic import disk_error

    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise disk_error(path, error) from error


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this package's own repository, `-dirty` where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # An installed package may lie inside another repository, which does not know its files.
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", "app.py"], capture_output=True, check=True
        )
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
