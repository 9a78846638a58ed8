"""The VAE in strips against diffusers' own, the whole map at once."""

import pytest
import torch
from checkpoints import tiny_models
from tolerances import VAE_STRIPS_FP32, relative_error

from flux_nf4.model import strips


@pytest.fixture(scope="module")
def vae():
    return tiny_models()["vae"].eval()


@pytest.mark.parametrize("strip_pixels", [2**15, 2**8, 2**4])
@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (5, 12), (1, 3)])
@torch.inference_mode()
def test_strips_decode_what_the_whole_map_does(monkeypatch, vae, strip_pixels, rows, columns):
    monkeypatch.setattr(strips, "STRIP_PIXELS", strip_pixels)
    latents = torch.randn(1, 16, rows, columns)
    expected = vae.decode(latents, return_dict=False)[0]

    assert relative_error(strips.decode_in_strips(vae, latents), expected) < VAE_STRIPS_FP32


@pytest.mark.parametrize("strip_pixels", [2**15, 2**8, 2**4])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (40, 96), (8, 24)])
@torch.inference_mode()
def test_strips_encode_what_the_whole_map_does(monkeypatch, vae, strip_pixels, rows, columns):
    monkeypatch.setattr(strips, "STRIP_PIXELS", strip_pixels)
    image = torch.rand(1, 3, rows, columns) * 2 - 1
    expected = vae.encode(image, return_dict=False)[0].parameters

    assert relative_error(strips.encode_in_strips(vae, image), expected) < VAE_STRIPS_FP32
