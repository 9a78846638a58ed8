"""The FLUX transformer: a conditioner that makes modulation, and blocks that take it.

Inference uses the two parts (`conditioner.table` once, `blocks` every step); `forward` joins them
for one plain, differentiable pass, as training and the parity tests want it.
"""

from __future__ import annotations

from torch import Tensor, nn

from flux_nf4.model.blocks import FluxBlocks
from flux_nf4.model.conditioner import Conditioner
from flux_nf4.model.config import FluxConfig


class FluxTransformer(nn.Module):
    """Equal to Diffusers' `FluxTransformer2DModel` on the same weights.

    Parameter names are BFL's behind the name of the part that owns them, `conditioner.` or
    `blocks.`; without that prefix no two of them are alike.
    """

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        self.conditioner = Conditioner(config)
        self.blocks = FluxBlocks(config)

    def forward(
        self,
        img_BLC: Tensor,
        txt_BTD: Tensor,
        pooled_BP: Tensor,
        timestep_B: Tensor,
        guidance_B: Tensor | None,
        rope_2SF: Tensor,
    ) -> Tensor:
        """(B, L, C) tokens at times `timestep_B` (1 noise, 0 image) -> velocity (B, L, C).

        Letters as in `blocks` and `conditioner`. `rope_2SF` comes from `rope.rope_table`.
        """
        modulation_BM = self.conditioner(timestep_B, guidance_B, pooled_BP)
        return self.blocks(img_BLC, txt_BTD, modulation_BM, rope_2SF)
