"""Quantise, run, fine-tune and serve FLUX.1 with its weights in 4-bit NF4."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flux_nf4.pipeline.compat import FluxPipeline

__all__ = ["FluxPipeline", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: `import flux_nf4` must not pay for what it may not use.
    if name == "FluxPipeline":
        from flux_nf4.pipeline.compat import FluxPipeline

        return FluxPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
