"""The formulas against the real modules: live tensors are counted on the CPU, in bfloat16."""

import dataclasses

import pytest
import torch
from live_bytes import peak_bytes
from tolerances import (
    ACTIVATIONS_LEAST_SHARE,
    DECODE_LEAST_SHARE,
    DECODE_ON_A_GPU_LEAST_SHARE,
)

from flux_nf4.memory import activations
from flux_nf4.memory.activations import Workload
from flux_nf4.memory.checkpoint_inventory import flux_1_dev
from flux_nf4.model import strips
from flux_nf4.model.blocks import FluxBlocks
from flux_nf4.model.conditioner import Conditioner
from flux_nf4.model.config import FluxConfig
from flux_nf4.model.rope import rope_table

BF16 = torch.bfloat16
NO_SCRATCH = {
    "t5_scratch_bytes": 0,
    "conditioner_scratch_bytes": 0,
    "block_scratch_bytes": 0,
}


def inventory(**sizes):
    """FLUX.1-dev with other sizes, and plain weights that are not expanded."""
    dev = flux_1_dev()
    sized = dataclasses.replace(dev.sizes, **sizes)
    return dataclasses.replace(dev, **NO_SCRATCH, sizes=sized, is_fused=False)


def random(*shape):
    return torch.randn(shape).to(BF16)


@pytest.fixture(scope="module")
def config():
    return FluxConfig(
        hidden_size=512,
        num_heads=4,
        num_double_blocks=2,
        num_single_blocks=2,
        context_dim=256,
        pooled_dim=64,
    )


@pytest.mark.parametrize(("size", "batch_size"), [(256, 1), (512, 1), (256, 3)])
def test_a_step_takes_what_is_planned(config, size, batch_size):
    blocks = FluxBlocks(config).to(BF16)
    workload = Workload(width=size, height=size, num_steps=1, num_text_tokens=64)
    num_tokens, side = workload.num_tokens, size // 16
    rope = rope_table(64, side, side, config)
    given = (
        random(batch_size, num_tokens, 64),
        random(batch_size, 64, config.context_dim),
        random(batch_size, config.modulation_width),
        rope,
    )
    sized = inventory(
        hidden_size=config.hidden_size,
        context_dim=config.context_dim,
        modulation_width=config.modulation_width,
    )
    planned = activations.denoise_bytes(sized, workload, batch_size)
    taken = peak_bytes(lambda: blocks(*given), *given, *blocks.parameters())

    assert taken <= planned
    assert taken + sum(each.nbytes for each in given) >= ACTIVATIONS_LEAST_SHARE * planned


def test_the_table_takes_what_is_planned(config):
    conditioner = Conditioner(config).to(BF16)
    workload = Workload(width=64, height=64, num_steps=30, num_text_tokens=32)
    sized = inventory(
        hidden_size=config.hidden_size,
        context_dim=config.context_dim,
        modulation_width=config.modulation_width,
    )
    given = (torch.linspace(1, 0, 30), torch.tensor([3.5]), random(1, config.pooled_dim))
    planned = activations.modulation_bytes(sized, workload)
    taken = peak_bytes(lambda: conditioner.table(*given), *given, *conditioner.parameters())

    assert ACTIVATIONS_LEAST_SHARE * planned <= taken <= planned


@pytest.mark.parametrize(("num_tokens", "num_prompts"), [(64, 1), (256, 1), (256, 2)])
@pytest.mark.parametrize(("heads", "mlp_width"), [(64, 1024), (4, 2048)])
def test_t5_takes_what_is_planned(num_tokens, num_prompts, heads, mlp_width):
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5EncoderModel

    config = T5Config(
        vocab_size=100,
        d_model=512,
        d_kv=64,
        d_ff=mlp_width,
        num_layers=2,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )
    model = T5EncoderModel(config).to(BF16).eval()
    ids = torch.zeros(num_prompts, num_tokens, dtype=torch.long)
    sized = inventory(
        context_dim=512,
        t5_heads=heads,
        t5_attention_width=64 * heads,
        t5_mlp_width=mlp_width,
        clip_mlp_width=64,
    )
    workload = Workload(width=64, height=64, num_text_tokens=num_tokens, is_guided=num_prompts == 2)
    known = (ids, *model.parameters(), *model.buffers())
    planned = activations.text_bytes(sized, workload)

    assert peak_bytes(lambda: model(input_ids=ids).last_hidden_state, *known) <= planned


@pytest.mark.parametrize("widths", [(16, 32, 64, 64), (32, 32, 32, 32), (64, 16, 16, 16)])
@pytest.mark.parametrize(("rows", "columns"), [(8, 16), (24, 16)])
def test_decoding_takes_what_is_planned(monkeypatch, widths, rows, columns):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.device("meta"):  # bytes are counted, not values
        latents = random(1, 16, rows, columns)
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=16,
            norm_num_groups=8,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    model = model.to(BF16).eval()
    workload = Workload(width=8 * columns, height=8 * rows)
    sizes = inventory(vae_widths=widths).sizes
    monkeypatch.setattr(strips, "STRIP_PIXELS", 2**10)
    monkeypatch.setattr(activations, "STRIP_PIXELS", 2**10)
    planned = activations.decode_bytes(sizes, workload, 1)
    known = (latents, *model.parameters())
    taken = peak_bytes(lambda: strips.decode_in_strips(model, latents), *known)

    assert DECODE_LEAST_SHARE * planned <= taken <= planned


@pytest.mark.parametrize(
    ("width", "height", "taken"),
    [
        (256, 256, 136_841_216),
        (512, 512, 275_779_584),
        (896, 1152, 579_504_640),
        (1024, 1024, 589_859_328),
        (1536, 640, 546_867_712),
        (2048, 2048, 2_200_734_208),
    ],
)
def test_decoding_takes_on_an_h200_what_is_planned(width, height, taken):
    """Bytes at the worst moment, FLUX.1's VAE in bfloat16 (torch 2.11, cuDNN 9.19)."""
    planned = activations.decode_bytes(flux_1_dev().sizes, Workload(width=width, height=height), 1)
    assert DECODE_ON_A_GPU_LEAST_SHARE * planned <= taken <= planned


def test_a_step_at_1024_computes_what_the_books_say():
    flops = activations.step_flops(flux_1_dev(), Workload(width=1024, height=1024), 1)

    assert round(flops / 1e12, 1) == 74.4


def test_the_strips_that_are_planned_are_those_that_are_decoded():
    assert activations.STRIP_PIXELS == strips.STRIP_PIXELS
