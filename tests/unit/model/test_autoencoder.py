"""The autoencoder's shapes and refusals."""

from dataclasses import replace

import pytest
import torch

from flux_nf4.errors import FormatError
from flux_nf4.formats.facts import Facts
from flux_nf4.model.autoencoder import Autoencoder
from flux_nf4.model.build import build_autoencoder

FACTS = Facts(vae_norm_num_groups=4)
BUILD = {"device": "cpu", "dtype": torch.float32}


def test_decoding_doubles_the_size_at_every_level_but_one(vae):
    built = build_autoencoder(vae, FACTS, **BUILD)
    with torch.no_grad():
        images = built.decode(torch.randn(2, 16, 3, 5))
    assert (images.shape, built.pixels_per_latent) == ((2, 3, 6, 10), 2)


def test_decoding_does_not_hide_infinity(vae):
    built = build_autoencoder(vae, FACTS, **BUILD)
    with torch.no_grad():
        built.model.decoder.conv_out.bias.fill_(float("inf"))
        images = built.decode(torch.randn(1, 16, 4, 4))
    assert images.isinf().all()


def test_decoding_keeps_not_a_number(vae):
    built = build_autoencoder(vae, FACTS, **BUILD)
    with torch.no_grad():
        assert built.decode(torch.full((1, 16, 4, 4), torch.nan)).isnan().any()


def test_latents_are_shifted_and_scaled_both_ways(vae):
    facts = Facts(vae_norm_num_groups=4, vae_scaling_factor=1.0, vae_shift_factor=0.0)
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        plain, _ = build_autoencoder(vae, facts, **BUILD).encode(images)
        built = build_autoencoder(vae, FACTS, **BUILD)
        latents, _ = built.encode(images)
        torch.testing.assert_close(latents, (plain - 0.1159) * 0.3611)
        torch.testing.assert_close(
            built.decode(latents), build_autoencoder(vae, facts, **BUILD).decode(plain)
        )


def test_latents_are_float32_whatever_it_computes_in(vae):
    built = build_autoencoder(vae, FACTS, device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        latents = built.encode(torch.zeros(1, 3, 8, 8))
    assert [each.dtype for each in latents] == [torch.float32] * 2


def test_colours_of_flux_1s_latents_need_no_weights(vae):
    model = build_autoencoder(vae, FACTS, **BUILD).model
    model.config = replace(model.config, widths=(128, 256, 512, 512))
    del model.encoder, model.decoder
    built = Autoencoder(model, scaling_factor=0.3611, shift_factor=0.1159)
    assert built.knows_colours
    latents = torch.zeros(1, 16, 1, 2)
    latents[0, 9, 0, 1] = 2.0
    colours = built.colours(latents)[0, :, 0].T
    torch.testing.assert_close(colours[0], torch.tensor([-0.0329, -0.0718, -0.0851]))
    torch.testing.assert_close(colours[1] - colours[0], 2 * torch.tensor([0.1008, 0.0755, -0.0421]))


def test_colours_of_another_vaes_latents_are_fitted_once(vae, monkeypatch):
    built = build_autoencoder(vae, FACTS, **BUILD)
    latents = torch.randn(2, 16, 3, 5)
    with torch.no_grad():
        colours = built.colours(latents)
        monkeypatch.setattr(built, "encode", None)
        assert torch.equal(built.colours(latents), colours)
    assert colours.shape == (2, 3, 3, 5)


@pytest.mark.parametrize("groups", [5, 32])
def test_groups_that_do_not_divide_the_channels_are_refused(vae, groups):
    with pytest.raises(FormatError, match=rf"\[8, 12\] channels.*{groups} groups"):
        build_autoencoder(vae, Facts(vae_norm_num_groups=groups), **BUILD)


def test_a_gap_among_the_levels_is_named(vae):
    entries = {
        name.replace("encoder.down_blocks.1.", "encoder.down_blocks.2."): entry
        for name, entry in vae.entries.items()
    }
    with pytest.raises(FormatError, match="up to 2 but lacks 1 of them: 1"):
        build_autoencoder(replace(vae, entries=entries), FACTS, **BUILD)


def test_images_of_four_channels_are_refused(vae):
    entries = {**vae.entries, "decoder.conv_out.weight": torch.zeros(4, 8, 3, 3)}
    with pytest.raises(FormatError, match=r"is \(4, 8, 3, 3\) and must be \(3, 8, 3, 3\)"):
        build_autoencoder(replace(vae, entries=entries), FACTS, **BUILD)
