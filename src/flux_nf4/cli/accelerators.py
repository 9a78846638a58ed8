"""PyTorch and the GPUs: what is built in, what the driver offers, what each device can do.

Gathering and judging are apart, so that the judging is tested without the hardware.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from flux_nf4.cli.findings import Finding, gib_text

if TYPE_CHECKING:
    from collections.abc import Iterator

# What FLUX.1-dev needs at 1024 x 1024 (`flux-nf4 plan`), and from where on no step moves weights.
_LEAST_MEMORY, _ENOUGH_MEMORY = 1_480 * 2**20, 6 * 2**30
# The first compute capability whose tensor cores multiply in each format (CUDA's tables).
_ARITHMETIC = {"int8": (7, 5), "bf16": (8, 0), "fp8": (8, 9), "fp4": (10, 0)}
_INSTALL_CUDA = (
    "install PyTorch's CUDA build: `pip install --force-reinstall torch` on Linux; on Windows the "
    "command that https://pytorch.org/get-started/locally/ gives"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One GPU; memory in bytes."""

    name: str
    capability: tuple[int, int]
    free: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Torch:
    """PyTorch as it is installed; `cuda` is the version it was built for, if for any."""

    version: str
    cuda: str | None
    cards: tuple[Card, ...]
    has_mps: bool
    triton: str | None


def inspect_torch() -> Torch:
    """Ask the installed PyTorch; it must be importable."""
    import torch

    cards = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            capability = (properties.major, properties.minor)
            cards.append(Card(name=properties.name, capability=capability, free=free, total=total))
    has_triton = importlib.util.find_spec("triton") is not None
    return Torch(
        version=torch.__version__,
        cuda=torch.version.cuda,
        cards=tuple(cards),
        has_mps=torch.backends.mps.is_available(),
        triton=metadata.version("triton") if has_triton else None,
    )


def nvidia_driver() -> str | None:
    """The version of NVIDIA's driver, `unknown` where only its presence shows, None without."""
    command = shutil.which("nvidia-smi")
    if command is not None:
        try:
            said = subprocess.run(
                [command, "--query-gpu=driver_version", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout.split()
        except (OSError, subprocess.SubprocessError):
            said = []
        if said:
            return said[0]
    has_driver = Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()
    return "unknown" if has_driver else None


def torch_findings(torch: Torch, driver: str | None) -> Iterator[Finding]:
    """PyTorch against the driver, each GPU, and Triton."""
    built = f"for CUDA {torch.cuda}" if torch.cuda else "without CUDA"
    text = f"PyTorch {torch.version}, built {built}"
    if driver is None:
        yield Finding(severity="ok", topic="torch", text=text)
        if not torch.cards and not torch.has_mps:
            yield Finding(
                severity="note",
                topic="gpu",
                text="no GPU: the demo model draws in seconds, FLUX.1-dev takes long",
            )
    elif torch.cuda is None:
        yield Finding(
            severity="problem",
            topic="torch",
            text=f"{text}, but this machine has an NVIDIA GPU (driver {driver})",
            remedy=_INSTALL_CUDA,
        )
    elif not torch.cards:
        yield Finding(
            severity="problem",
            topic="torch",
            text=f"{text}, cannot use the GPU with driver {driver}",
            remedy=f"update NVIDIA's driver to one for CUDA {torch.cuda} or later, or install a "
            "PyTorch built for an older CUDA; check CUDA_VISIBLE_DEVICES",
        )
    else:
        yield Finding(severity="ok", topic="torch", text=f"{text}, driver {driver}")
    if torch.has_mps:
        yield Finding(severity="ok", topic="gpu", text="Apple GPU, through MPS")
    for index, card in enumerate(torch.cards):
        yield card_finding(index, card)
    yield from _triton_findings(torch)


def card_finding(index: int, card: Card) -> Finding:
    """What one GPU offers, and whether that is enough."""
    major, minor = card.capability
    offered = [name for name, least in _ARITHMETIC.items() if card.capability >= least]
    text = (
        f"GPU {index}: {card.name}, compute capability {major}.{minor}, {gib_text(card.free)} free "
        f"of {gib_text(card.total)}, {', '.join(offered) or 'no fast low-precision'} arithmetic"
    )
    if card.total < _LEAST_MEMORY:
        return Finding(
            severity="warning",
            topic="gpu",
            text=f"{text}: FLUX.1-dev needs a card of 2 GB",
            remedy="use `--device cpu`, or the demo model",
        )
    if card.free < 0.8 * min(card.total, _ENOUGH_MEMORY):
        return Finding(
            severity="warning",
            topic="gpu",
            text=f"{text}: other programs hold most of its memory",
            remedy="close them (`nvidia-smi` lists them), or choose another with `--device cuda:1`",
        )
    if card.total < 0.95 * _ENOUGH_MEMORY:  # cards sold as 6 GB show a little less
        return Finding(
            severity="note",
            topic="gpu",
            text=f"{text}: FLUX.1-dev fits, but its weights are moved in every step",
            remedy="`flux-nf4 plan --vram auto` tells how fast that is",
        )
    if "bf16" not in offered:
        return Finding(
            severity="note", topic="gpu", text=f"{text}: computes in float32, which is slower"
        )
    return Finding(severity="ok", topic="gpu", text=text)


def _triton_findings(torch: Torch) -> Iterator[Finding]:
    if torch.triton is not None:
        yield Finding(severity="ok", topic="triton", text=f"Triton {torch.triton}")
    elif torch.cards:
        yield Finding(
            severity="warning",
            topic="triton",
            text="no Triton: NF4 weights are expanded by plain PyTorch, which is slower",
            remedy="pip install triton (on Windows: triton-windows)",
        )
