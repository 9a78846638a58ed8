"""Main memory: how much there is, and how much of it weights may take where nobody says."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# CUDA's libraries, PyTorch and an image on its way take 1.5 GB; the rest is for what runs beside.
ROOM_BYTES = 2 * 2**30
# A process that streams everything takes 2.91 to 2.95 GB beside weights (measured with an H200). It
# is to take no more than its file and 1.5 GB: so a large model's last weights stay in the file.
_PROCESS_BYTES, _BESIDE_FILE_BYTES = 3_000_000_000, 1_500_000_000
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """Main memory in bytes, within a container's limit; None where the system does not tell."""

    free: int | None
    total: int | None

    def for_weights(self, num_bytes: int) -> int:
        """How many of a model's bytes may lie there; those without a place stay in the file.

        All but 1.5 GB, or of a small model an eighth; and no more than is free, less room for all
        else.
        """
        room = num_bytes - min(_PROCESS_BYTES - _BESIDE_FILE_BYTES, num_bytes // 8)
        return room if self.free is None else min(room, max(0, self.free - ROOM_BYTES))

    @property
    def for_pinning(self) -> int | None:
        """Half of all: pinned pages are never swapped, and Windows (WSL, too) pins no more."""
        return None if self.total is None else self.total // 2


def measure_host() -> HostMemory:
    """What this process may have now."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return HostMemory(free=None, total=_total_bytes())
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    free, total = sizes.get("MemAvailable"), sizes.get("MemTotal")
    limit, used = (_cgroup_number(name) for name in ("memory.max", "memory.current"))
    if limit is None or used is None or total is None or limit >= total:
        return HostMemory(free=free, total=total)
    within = max(limit - used + _cached_bytes(), 0)
    return HostMemory(free=within if free is None else min(within, free), total=limit)


def _total_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _cgroup_number(name: str) -> int | None:
    try:
        return int((_CGROUP / name).read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such limit, or the word `max`
        return None


def _cached_bytes() -> int:
    """Files in the system's cache: they count as used, and give way to whoever needs memory."""
    try:
        lines = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    sizes = dict(line.split() for line in lines)
    return sum(int(sizes.get(name, 0)) for name in ("active_file", "inactive_file"))
