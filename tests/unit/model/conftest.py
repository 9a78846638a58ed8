"""Components of tiny random models, made from our own modules and transformers' and diffusers'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_config import tiny

from flux_nf4.formats.component import Component
from flux_nf4.model.config import FluxConfig
from flux_nf4.model.transformer import FluxTransformer


def component(kind: str, tensors: dict[str, torch.Tensor]) -> Component:
    generator = torch.Generator().manual_seed(0)
    entries = {
        name: torch.randn(tensor.shape, generator=generator) / 16
        for name, tensor in tensors.items()
    }
    return Component(kind=kind, entries=entries, source=Path(f"{kind}.safetensors"))


@pytest.fixture
def make_transformer() -> Callable[..., Component]:
    """A transformer's component, under BFL's names."""

    def make(config: FluxConfig | None = None) -> Component:
        with torch.device("meta"):
            module = FluxTransformer(config or tiny())
        named = {name.partition(".")[2]: value for name, value in module.named_parameters()}
        return component("transformer", named)

    return make


@pytest.fixture
def t5() -> Component:
    """T5: vocabulary 50, width 64, 2 heads of 16, 2 blocks."""
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5EncoderModel

    config = T5Config(
        vocab_size=50, d_model=64, d_kv=16, num_heads=2, d_ff=96, num_layers=2,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = T5EncoderModel(config)
    return component("t5", dict(model.named_parameters()))


@pytest.fixture
def clip() -> Component:
    """CLIP: vocabulary 50, width 128, 2 layers, and a projection that nobody needs."""
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=50, hidden_size=128, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=None, pad_token_id=None, eos_token_id=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = CLIPTextModel(config)
    named = {
        "text_model." + name.removeprefix("text_model."): value
        for name, value in model.named_parameters()
    }
    return component("clip", {**named, "text_projection.weight": torch.empty(128, 128)})


@pytest.fixture
def vae() -> Component:
    """An autoencoder of two levels, 8 and 12 channels, 16 latent channels."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.device("meta"):
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 12),
            latent_channels=16,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    return component("vae", dict(model.named_parameters()))
