"""What a plan is made for: how much memory, and how fast a machine. Whole numbers throughout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

MIB = 2**20
# CUDA's context and the kernels of cuBLAS, cuDNN and PyTorch: in the process, not the allocator's.
CONTEXT_BYTES = 512 * MIB
# Workspaces of cuBLAS (32 MiB on Hopper), seeds, what the allocator rounds up: beside what the
# formulas tell exactly 96.3 MiB were measured.
SLACK_BYTES = 100 * MIB
# What `auto` leaves free: windows open while an image is drawn.
DESKTOP_BYTES = 256 * MIB

Home: TypeAlias = Literal["device", "pinned", "pageable", "file"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What may be taken. `device_bytes` is the whole process as the driver counts it.

    `context_bytes` of those never reach the allocator; 0 where `device_bytes` is a cap on the
    allocator alone. Host bytes hold weights; None: as many as there are.
    """

    device_bytes: int
    context_bytes: int = CONTEXT_BYTES
    host_bytes: int | None = None
    pinned_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Speeds, for predictions. `step_ns` is a measured step of one image, where there is one.

    Taken where nothing was measured: PCIe 4.0 x16 at 80 % of its 31.5 GB/s; pageable copies at the
    H200's share of it; a usual NVMe disk; and the 74.4 TFLOP of a step at 1024 x 1024 in the
    2.15 s that Forge is reported to take on a laptop's RTX 3070 Ti.
    """

    pinned_bytes_per_s: int = 25_200_000_000
    pageable_bytes_per_s: int = 6_000_000_000
    file_bytes_per_s: int = 2_000_000_000
    flops_per_s: int = 34_600_000_000_000
    step_ns: int | None = None

    def transfer_ns(self, num_bytes: int, home: Home) -> int:
        """How long bytes take to the device from where they are."""
        speeds = {
            "pinned": self.pinned_bytes_per_s,
            "pageable": min(self.pageable_bytes_per_s, self.pinned_bytes_per_s),
            "file": min(self.file_bytes_per_s, self.pageable_bytes_per_s, self.pinned_bytes_per_s),
        }
        return 0 if home == "device" else -(-num_bytes * 10**9 // speeds[home])

    def compute_ns(self, flops: int) -> int:
        """How long so many floating-point operations take."""
        return -(-flops * 10**9 // self.flops_per_s)
