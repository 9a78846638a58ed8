"""Configurations of transformers that are small enough for a test."""

from flux_nf4.model.config import FluxConfig, axes_for_head


def tiny(
    *,
    num_heads=2,
    num_double_blocks=1,
    num_single_blocks=2,
    in_channels=64,
    guidance_embed=True,
):
    """Heads of 64 channels, so that every width fills blocks of NF4."""
    return FluxConfig(
        in_channels=in_channels,
        hidden_size=64 * num_heads,
        num_heads=num_heads,
        num_double_blocks=num_double_blocks,
        num_single_blocks=num_single_blocks,
        context_dim=64,
        pooled_dim=64,
        axes_dim=axes_for_head(64),
        guidance_embed=guidance_embed,
    )
