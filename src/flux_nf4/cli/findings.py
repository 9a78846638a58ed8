"""What `doctor` finds: how grave it is, what it is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Severity: TypeAlias = Literal["ok", "note", "warning", "problem"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at; `remedy` says what to do, where something is to be done."""

    severity: Severity
    topic: str
    text: str
    remedy: str = ""


def num_bytes_text(num_bytes: float) -> str:
    """Bytes as people read them, in powers of ten as disks and downloads are sold: `12.04 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


def counted(number: int, noun: str) -> str:
    """How many of them there are: `1 step`, `1,004 steps`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def gib_text(num_bytes: float) -> str:
    """Bytes of memory in powers of two, as memory is sold: `23.4 GiB`."""
    return f"{num_bytes / 2**30:.1f} GiB"
