"""Our autoencoder against Diffusers' `AutoencoderKL` on the same random weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from tolerances import BF16_ERROR_RATIO, VAE_FP32, relative_error

from flux_nf4.formats.component import Component
from flux_nf4.formats.facts import Facts
from flux_nf4.model.build import build_autoencoder

FACTS = Facts(vae_norm_num_groups=4, vae_scaling_factor=0.57, vae_shift_factor=0.08)
CONFIGS = {
    "like FLUX": {
        "block_out_channels": (8, 12, 16, 16), "layers_per_block": 2, "latent_channels": 16,
        "use_quant_conv": False, "use_post_quant_conv": False,
    },
    "like the demo": {
        "block_out_channels": (8, 12, 16, 24), "layers_per_block": 1, "latent_channels": 16,
        "use_quant_conv": False, "use_post_quant_conv": False,
    },
    "of two levels": {
        "block_out_channels": (8, 8), "layers_per_block": 1, "latent_channels": 4,
        "use_quant_conv": False, "use_post_quant_conv": False,
    },
}  # fmt: skip
every_config = pytest.mark.parametrize("sizes", CONFIGS.values(), ids=CONFIGS.keys())


def make_theirs(sizes) -> AutoencoderKL:
    num_levels = len(sizes["block_out_channels"])
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        norm_num_groups=FACTS.vae_norm_num_groups,
        scaling_factor=FACTS.vae_scaling_factor,
        shift_factor=FACTS.vae_shift_factor,
        **sizes,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_((1.0 if name.endswith("weight") else 0.0) + 0.1 * noise)
        model.decoder.conv_out.weight.mul_(0.2)
    return model


def make_ours(theirs: AutoencoderKL, dtype: torch.dtype):
    component = Component(kind="vae", entries=theirs.state_dict(), source=Path("vae"))
    return build_autoencoder(component, FACTS, device="cpu", dtype=dtype)


def decode_theirs(theirs: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    config = theirs.config
    shifted = latents / config.scaling_factor + config.shift_factor
    with torch.no_grad():
        return theirs.decode(shifted, return_dict=False)[0].float()


def make_latents(sizes) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, sizes["latent_channels"], 5, 3, generator=generator)


def make_images(sizes) -> torch.Tensor:
    factor = 2 ** (len(sizes["block_out_channels"]) - 1)
    generator = torch.Generator().manual_seed(4)
    return torch.rand(2, 3, 3 * factor, 5 * factor, generator=generator) * 2 - 1


@every_config
def test_decoded_images_equal_diffusers_in_float32(sizes):
    theirs, latents = make_theirs(sizes), make_latents(sizes)
    with torch.no_grad():
        images = make_ours(theirs, torch.float32).decode(latents)
    assert relative_error(images, decode_theirs(theirs, latents)) < VAE_FP32


@every_config
def test_bfloat16_error_of_decoding_is_at_most_twice_that_of_diffusers(sizes):
    theirs, latents = make_theirs(sizes).bfloat16(), make_latents(sizes).bfloat16()
    with torch.no_grad():
        images = make_ours(theirs, torch.bfloat16).decode(latents).float()
    exact = decode_theirs(copy.deepcopy(theirs).float(), latents.float())
    their_error = relative_error(decode_theirs(theirs, latents), exact)
    assert relative_error(images, exact) <= BF16_ERROR_RATIO * their_error


@every_config
def test_encoded_mean_equals_diffusers_in_float32(sizes):
    theirs, images = make_theirs(sizes), make_images(sizes)
    with torch.no_grad():
        latents, _ = make_ours(theirs, torch.float32).encode(images)
        mode = theirs.encode(images).latent_dist.mode()
    expected = (mode - theirs.config.shift_factor) * theirs.config.scaling_factor
    assert relative_error(latents, expected) < VAE_FP32


@every_config
def test_encoded_mean_and_deviation_make_the_sample_of_diffusers(sizes):
    theirs, images = make_theirs(sizes), make_images(sizes)
    with torch.no_grad():
        mean, deviation = make_ours(theirs, torch.float32).encode(images)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(9))
        sample = theirs.encode(images).latent_dist.sample(torch.Generator().manual_seed(9))
    expected = (sample - theirs.config.shift_factor) * theirs.config.scaling_factor
    assert relative_error(mean + deviation * noise, expected) < VAE_FP32
