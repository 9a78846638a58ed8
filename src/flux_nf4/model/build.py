"""From the components of a checkpoint to modules that run.

The one door of this floor for the pipeline: each part has its `build_` function here. Sizes come
from names and shapes; what a tensor is stored as decides the layer that holds it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flux_nf4.model.assemble import assemble, check_compute_dtype
from flux_nf4.model.autoencoder import build_autoencoder
from flux_nf4.model.fast_step import fast_step
from flux_nf4.model.sizes import flux_config
from flux_nf4.model.text import build_clip, build_t5
from flux_nf4.model.transformer import FluxTransformer

if TYPE_CHECKING:
    from flux_nf4.formats.component import Component

__all__ = ["build_autoencoder", "build_clip", "build_t5", "build_transformer"]


def build_transformer(
    component: Component, *, device: torch.device | str, dtype: torch.dtype
) -> FluxTransformer:
    """A FLUX transformer of any size that computes in `dtype`.

    NF4 and 8-bit weights keep their storage; the scales of the QK norms are float32.

    Raises:
        InputError: `dtype` is neither bfloat16 nor float32.
        FormatError: the entries are not those of a FLUX transformer.
    """
    check_compute_dtype(dtype)
    with torch.device("meta"):
        transformer = FluxTransformer(flux_config(component))
    # The module's names are the file's behind the name of the part: `blocks.` or `conditioner.`.
    names = {name: name.partition(".")[2] for name, _ in transformer.named_parameters()}
    assemble(transformer, component, device=device, dtype=dtype, names=names)
    transformer.blocks.fast_step = fast_step
    return transformer
