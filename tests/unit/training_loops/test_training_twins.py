"""The networks in training compute what those compute that people load the weights with."""

import pytest
import torch
from tolerances import TRAINING_TWIN_FP32, relative_error
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flux_nf4.model.rope import rope_table
from flux_nf4.model.vae import Vae
from training.autoencoder import DRY_RUN_SIZES as SIZES_OF_VAE
from training.autoencoder import Autoencoder
from training.networks import (
    ClipText,
    Sizes,
    T5Encoder,
    load_transformer_weights,
    make_networks,
    matrix_pieces,
    relative_buckets,
    start_clip,
    transformer_weights,
)

SIZES = Sizes(
    num_heads=1,
    num_double_blocks=1,
    num_single_blocks=1,
    t5_width=64,
    t5_inner=128,
    t5_layers=2,
    t5_vocabulary=50,
    clip_width=64,
    clip_layers=2,
    clip_vocabulary=50,
)


def randomized(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return module.eval()


def token_ids() -> Tensor:
    ids = torch.randint(2, 50, (3, 32), generator=torch.Generator().manual_seed(1))
    ids[0, 10:] = 1
    ids[1, 31] = 1
    ids[2, 0] = 1
    return ids


def test_t5_twin_equals_transformers() -> None:
    ours = randomized(T5Encoder(SIZES))
    config = T5Config(
        vocab_size=50,
        d_model=64,
        num_heads=2,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        feed_forward_proj="gated-gelu",
    )
    theirs = T5EncoderModel(config).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert set(missing) <= {"encoder.embed_tokens.weight"}
    assert unexpected == []
    with torch.no_grad():
        assert (
            relative_error(ours(token_ids()), theirs(token_ids()).last_hidden_state)
            < TRAINING_TWIN_FP32
        )


def test_clip_twin_equals_transformers_pooled_output() -> None:
    ours = randomized(start_clip(ClipText(SIZES)))
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    theirs = CLIPTextModel(config).eval()
    weights = ours.state_dict()
    if not any(name.startswith("text_model.") for name in theirs.state_dict()):
        weights = {name.removeprefix("text_model."): value for name, value in weights.items()}
    theirs.load_state_dict(weights)
    with torch.no_grad():
        assert (
            relative_error(ours(token_ids()), theirs(token_ids()).pooler_output)
            < TRAINING_TWIN_FP32
        )


@torch.no_grad()
def test_norms_that_suit_autocast_change_nothing() -> None:
    ours, theirs = randomized(Autoencoder(SIZES_OF_VAE)), Vae(SIZES_OF_VAE).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(2))
    assert torch.equal(torch.cat(ours.moments(images), dim=1), theirs.encode(images))
    latents = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(3))
    assert torch.equal(ours.decode(latents), theirs.decode(latents))


def test_every_weight_is_trained() -> None:
    networks = make_networks(SIZES, torch.device("cpu"))
    parts = (*networks.modules(), Autoencoder(SIZES_OF_VAE))
    assert all(parameter.requires_grad for part in parts for parameter in part.parameters())


def test_buckets_are_symmetric_but_for_the_side() -> None:
    buckets = relative_buckets(32)
    above = buckets.triu(1)
    assert torch.equal(above[above > 0] - 16, buckets.tril(-1).T[above > 0])


def test_transformer_weights_carry_bfl_names_and_load_back() -> None:
    networks = make_networks(SIZES, torch.device("cpu"))
    weights = transformer_weights(networks.transformer)
    assert {"img_in.weight", "double_blocks.0.img_mod.lin.bias"} <= weights.keys()
    load_transformer_weights(networks.transformer, weights)


def test_a_left_over_name_is_refused() -> None:
    networks = make_networks(SIZES, torch.device("cpu"))
    weights = transformer_weights(networks.transformer) | {"extra.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"extra\.weight"):
        load_transformer_weights(networks.transformer, weights)


@pytest.mark.parametrize(
    ("name", "shape", "pieces"),
    [
        ("blocks.double_blocks.0.img_attn.qkv.weight", (192, 64), [64, 64, 64]),
        ("blocks.single_blocks.0.linear1.weight", (448, 64), [64, 64, 64, 256]),
        ("blocks.single_blocks.0.linear2.weight", (64, 320), [64]),
        ("blocks.img_in.weight", (64, 64), None),
        ("conditioner.double_blocks.0.img_mod.lin.weight", (384, 64), None),
    ],
)
def test_fused_layers_are_told_apart(
    name: str, shape: tuple[int, int], pieces: list[int] | None
) -> None:
    assert matrix_pieces(name, torch.zeros(shape)) == pieces


def test_an_untrained_transformer_predicts_zero() -> None:
    networks = make_networks(SIZES, torch.device("cpu"))
    torch.manual_seed(0)
    text = networks.encode(token_ids(), token_ids())
    rope = rope_table(32, 2, 2, SIZES.flux)
    velocity = networks.transformer(
        torch.randn(3, 4, 64), *text, torch.rand(3), torch.ones(3), rope
    )
    assert torch.equal(velocity, torch.zeros_like(velocity))
