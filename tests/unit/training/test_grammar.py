"""Scenes: where things may stand, what training never sees, what the seed decides."""

from __future__ import annotations

from random import Random

import pytest

from training.grammar import (
    BACKGROUNDS,
    CANVAS,
    RELATIONS,
    SHARES,
    Scene,
    Sprite,
    draw_scene,
    draw_shade,
    is_held_out,
    is_held_out_scene,
    load_things,
    nearest_background,
    slots,
)

THINGS = load_things()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    random = Random(0)
    return [draw_scene(THINGS, random) for _ in range(4000)]


def test_every_corner_lies_on_the_token_grid(scenes: list[Scene]) -> None:
    sprites = [sprite for scene in scenes for sprite in scene.sprites]
    assert all((s.x - s.size // 2) % 16 == (s.y - s.size // 2) % 16 == 0 for s in sprites)


def test_every_sprite_is_whole_on_the_canvas(scenes: list[Scene]) -> None:
    sprites = [sprite for scene in scenes for sprite in scene.sprites]
    centres = [(value, s.size // 2) for s in sprites for value in (s.x, s.y)]
    assert all(half <= centre <= CANVAS - half for centre, half in centres)


def test_no_training_scene_shows_a_held_out_combination(scenes: list[Scene]) -> None:
    assert not any(is_held_out_scene(scene) for scene in scenes)


def test_a_twentieth_of_all_pairs_is_held_out() -> None:
    pairs = [(a, b) for a in range(524) for b in range(a)]
    share = sum(is_held_out("pair", *pair) for pair in pairs) / len(pairs)
    assert 0.045 < share < 0.055


def test_a_pair_is_held_out_in_either_order() -> None:
    pairs = [(a, b) for a in range(40) for b in range(40)]
    assert all(is_held_out("pair", a, b) == is_held_out("pair", b, a) for a, b in pairs)


def test_a_thing_at_a_held_out_place_is_held_out_though_the_place_is_not_said() -> None:
    concept = next(c for c in range(524) if is_held_out("place", c, "at the top"))
    sprite = Sprite(concept, 128, 64, 128)
    scene = Scene(kind="one", sprites=(sprite,), background="white", shade=(250, 250, 250))
    assert is_held_out_scene(scene)


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_every_shade_is_nearest_to_its_own_name(name: str) -> None:
    random = Random(1)
    assert all(nearest_background(draw_shade(name, random))[0] == name for _ in range(200))


def test_shades_of_a_colour_differ_visibly() -> None:
    random = Random(1)
    reds = [draw_shade("blue", random)[0] for _ in range(100)]
    assert max(reds) - min(reds) >= 30


def test_things_named_for_a_colour_are_never_tinted(scenes: list[Scene]) -> None:
    tinted = [s.concept for scene in scenes for s in scene.sprites if s.tint >= 0]
    assert all(THINGS[concept].tints for concept in tinted)


def test_a_purple_heart_takes_no_tint() -> None:
    assert not next(thing for thing in THINGS if "purple heart" in thing.names).tints


def test_what_a_caption_leaves_open_has_three_sizes(scenes: list[Scene]) -> None:
    assert {s.sprites[0].size for s in scenes if s.kind == "one"} == {128, 192, 256}


def test_every_kind_and_size_of_the_budget_is_drawn(scenes: list[Scene]) -> None:
    assert {(scene.kind, scene.sprites[0].size) for scene in scenes} == set(SHARES)


def test_shares_are_percent() -> None:
    assert sum(SHARES.values()) == 100


@pytest.mark.parametrize(("size", "wanted"), [(96, 2000), (128, 4000), (192, 5000), (256, 4000)])
def test_a_run_shows_each_thing_often_enough_in_each_size(size: int, wanted: int) -> None:
    num_sprites = {"pair": 2, "count": 3}
    percent = sum(
        share * num_sprites.get(kind, 1)
        for (kind, of_size), share in SHARES.items()
        if of_size == size
    )
    assert 15e6 * percent / 100 / len(THINGS) > wanted


def test_most_large_things_stand_in_the_centre(scenes: list[Scene]) -> None:
    large = [s for scene in scenes for s in scene.sprites if s.size == 192]
    assert sum((s.x, s.y) == (128, 128) for s in large) > len(large) / 2


@pytest.mark.parametrize(
    ("relation", "first", "second"),
    [
        ("to the left of", (64, 128, 128), (192, 128, 128)),
        ("to the right of", (192, 128, 128), (64, 128, 128)),
        ("next to", (64, 128, 128), (192, 128, 128)),
        ("and", (64, 128, 128), (192, 128, 128)),
        ("above", (128, 64, 128), (128, 192, 128)),
        ("below", (128, 192, 128), (128, 64, 128)),
    ],
)
def test_relation_places_the_first_named(
    relation: str, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    assert slots("pair", relation=relation) == [(first,), (second,)]


def test_every_relation_is_drawn(scenes: list[Scene]) -> None:
    assert {scene.relation for scene in scenes if scene.kind == "pair"} == set(RELATIONS)
