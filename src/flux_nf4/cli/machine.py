"""The machine without its accelerators: Python, system, processor, memory, packages, disk."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from flux_nf4.cli.findings import Finding, counted, gib_text, num_bytes_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_ENOUGH_FOR_THE_DEMO = 2 * 2**30
_ENOUGH_FOR_DEV = 16 * 2**30
_LITTLE_DISK = 10**9
_LEFTOVERS = (".flux-nf4-*.tmp*", "*.incomplete", "*.part", "*.crdownload")


def python_findings() -> Iterator[Finding]:
    """Python, and the system that it runs on."""
    bits = 64 if sys.maxsize > 2**32 else 32
    text = f"Python {platform.python_version()}, {platform.system()} {platform.release()}"
    if bits == 32:
        yield Finding(
            severity="problem",
            topic="python",
            text=f"{text}: this Python has 32 bits, and PyTorch needs 64",
            remedy="install a Python of 64 bits",
        )
        return
    yield Finding(severity="ok", topic="python", text=f"{text}, {platform.machine()}")


def processor_finding(capabilities: Mapping[str, bool]) -> Finding:
    """The processor; `capabilities` are those that PyTorch names."""
    text = f"CPU {processor_name()}, {counted(_usable_cores(), 'core')} to use"
    if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"):
        return Finding(severity="ok", topic="cpu", text=f"{text}, with bf16 arithmetic")
    return Finding(
        severity="note",
        topic="cpu",
        text=f"{text}, without bf16 arithmetic: on it, images are computed in float32",
    )


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_finding(free: int | None, total: int | None) -> Finding:
    """Main memory in bytes; None: this system does not tell."""
    if total is None:
        return Finding(severity="note", topic="memory", text="memory: this system does not tell")
    said = gib_text(total) if free is None else f"{gib_text(free)} free of {gib_text(total)}"
    if free is not None and free < _ENOUGH_FOR_THE_DEMO:
        return Finding(
            severity="warning",
            topic="memory",
            text=f"memory {said}: little even for the demo model",
            remedy="close other programs",
        )
    if total < _ENOUGH_FOR_DEV:
        text = f"memory {said}: enough for the demo model, little for FLUX.1-dev (12 GB of weights)"
        return Finding(severity="note", topic="memory", text=text)
    return Finding(severity="ok", topic="memory", text=f"memory {said}")


def package_findings(requirements: Iterable[str] | None = None) -> Iterator[Finding]:
    """Every package that flux-nf4 needs: its version, and whether that will do."""
    from packaging.requirements import Requirement

    if requirements is None:
        requirements = metadata.requires("flux-nf4") or ()
    versions = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, wanted = requirement.name, str(requirement.specifier)
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = ""
        if version and requirement.specifier.contains(version, prereleases=True):
            versions.append(f"{name} {version}")
            continue
        yield Finding(
            severity="problem",
            topic="packages",
            text=f"{name} {version or 'is missing'}; flux-nf4 needs {wanted}",
            remedy=f'pip install "{name}{wanted}"',
        )
    yield Finding(severity="ok", topic="packages", text=", ".join(versions))


def disk_finding(folder: Path, what: str) -> Finding:
    """Space left on the disk that `folder` lies on."""
    nearest = next(
        each for each in (folder.absolute(), *folder.absolute().parents) if each.exists()
    )
    free = shutil.disk_usage(nearest).free
    text = f"disk for {what}: {num_bytes_text(free)} free"
    if free < _LITTLE_DISK:
        return Finding(
            severity="warning", topic="disk", text=text, remedy=f"free some space near `{nearest}`"
        )
    return Finding(severity="ok", topic="disk", text=text)


def leftover_findings(folder: Path) -> Iterator[Finding]:
    """Files that were left half-written in `folder`: by us when killed, or by a download."""
    names = sorted({path.name for pattern in _LEFTOVERS for path in folder.glob(pattern)})
    if names:
        yield Finding(
            severity="warning",
            topic="disk",
            text=f"half-written files in `{folder}`: {', '.join(names[:5])}",
            remedy="delete them, unless a download or a conversion is still running",
        )
