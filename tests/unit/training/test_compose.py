"""The composer: sprites where, how large and which way round the scene says."""

from __future__ import annotations

import pytest
import torch
from tolerances import EIGHT_BIT_PIXEL

from training.compose import Composer, load_sprites

GRAY = torch.tensor([[128, 128, 128]])


def objects(*sprites: tuple[int, ...]) -> torch.Tensor:
    objs = torch.full((1, 4, 5), -1)
    for index, sprite in enumerate(sprites):
        objs[0, index] = torch.tensor(sprite)
    return objs


@pytest.fixture(scope="module")
def sprites() -> torch.Tensor:
    return load_sprites()[:8]


@pytest.fixture(scope="module")
def composer(sprites: torch.Tensor) -> Composer:
    return Composer(sprites)


def test_there_are_524_sprites_of_256_pixels() -> None:
    assert load_sprites().shape == (524, 256, 256, 4)


def test_no_sprite_leaves_the_background(composer: Composer) -> None:
    image = composer(objects(), torch.tensor([[255, 0, 255]]))
    assert image[0, :, 5, 5].tolist() == [1.0, -1.0, 1.0]
    assert (image == image[..., :1, :1]).all()


def test_largest_sprite_is_the_art_itself(composer: Composer, sprites: torch.Tensor) -> None:
    image = (composer(objects((3, 128, 128, 256, -1)), torch.zeros(1, 3)) + 1) / 2
    art = sprites[3].float() / 255
    exact = (art[..., :3] * art[..., 3:]).permute(2, 0, 1)
    assert (image[0] - exact).abs().max() < EIGHT_BIT_PIXEL


def test_sprite_stays_within_its_square(composer: Composer) -> None:
    image = composer(objects((1, 64, 192, 128, -1)), GRAY)
    background = image[0, 0, 0, 0]
    outside = torch.ones(256, 256, dtype=torch.bool)
    outside[128:256, 0:128] = False
    assert (image[0, :, outside] == background).all()


def test_moving_a_sprite_moves_its_pixels(composer: Composer) -> None:
    left = composer(objects((1, 64, 64, 128, -1)), GRAY)
    right = composer(objects((1, 192, 64, 128, -1)), GRAY)
    assert torch.equal(left[..., :128, :128], right[..., :128, 128:])


def test_a_tint_leaves_the_outline(composer: Composer) -> None:
    sprite = torch.tensor([[1, 128, 128, 192, -1]])
    tinted = torch.tensor([[1, 128, 128, 192, 4]])
    assert torch.equal(composer.layer(sprite)[1], composer.layer(tinted)[1])


def test_a_tint_changes_the_colour(composer: Composer) -> None:
    yellow = composer(objects((1, 128, 128, 192, -1)), GRAY)[0, :, 128, 128]
    blue = composer(objects((1, 128, 128, 192, 4)), GRAY)[0, :, 128, 128]
    assert yellow.argmax() == 0
    assert blue.argmax() == 2


def test_later_sprite_lies_over_the_earlier(composer: Composer) -> None:
    over = composer(objects((0, 128, 128, 96, -1), (2, 128, 128, 256, -1)), GRAY)
    alone = composer(objects((2, 128, 128, 256, -1)), GRAY)
    opaque = (composer.layer(torch.tensor([[2, 128, 128, 256, -1]]))[1] == 1)[0, 0]
    assert torch.allclose(over[..., opaque], alone[..., opaque], atol=EIGHT_BIT_PIXEL)


def test_static_mode_draws_the_same(composer: Composer) -> None:
    objs = torch.cat(
        [
            objects(),
            objects((1, 128, 128, 192, 2)),
            objects((3, 64, 64, 128, -1), (4, 192, 64, 128, -1)),
        ]
    )
    shades = torch.tensor([[10, 20, 30], [250, 250, 250], [90, 80, 70]])
    assert torch.equal(composer(objs, shades), composer(objs, shades, static=True))
