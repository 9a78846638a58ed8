"""What the demo model can be asked for: a random scene, and the rule that keeps some for the test.

The canvas is 256 x 256. Sprites have four sizes, and every corner lies on the 16-pixel token
grid, so the model sees few variants of each sprite; aligned data mattered more than anything
else that was tried. What a caption leaves open (place, size, shade) is drawn at random, so that
the seed decides it when the model is used. No mirror images: each is one more picture to learn.

`SHARES` spends a budget of exposures: 15 million images, which one run sees, are 286 for each of
the 524 things and each hundredth of a sprite an image. How often a thing is seen in each size:

    size   share of the images   seen     slots                            wanted
    192    24 % + 1 %            7,200    centre (70 %) and 4 beside it    5,000
    256    9 % + 7 %             4,600    1                                4,000
    128    singles 5 % + 8 %     3,700    9
           pairs 28 %           16,000    4                                4,000
           counts 10 %           8,600    8
    96     4 % + 4 %             2,300    9                                2,000
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from training import DATA

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

Kind = Literal["one", "place", "small", "big", "count", "pair", "nothing"]
Colour = tuple[int, int, int]
Slot = tuple[int, int, int]  # centre x, centre y, size
Parts = dict[str, object]

CANVAS = 256
SIZES = (96, 128, 192, 256)
BACKGROUNDS: dict[str, Colour] = {
    "white": (250, 250, 250),
    "light gray": (212, 214, 218),
    "gray": (136, 140, 146),
    "black": (22, 22, 26),
    "red": (214, 52, 52),
    "orange": (245, 146, 52),
    "yellow": (250, 218, 80),
    "green": (64, 158, 80),
    "light green": (172, 228, 164),
    "blue": (52, 104, 220),
    "light blue": (160, 214, 248),
    "dark blue": (26, 38, 108),
    "purple": (124, 70, 186),
    "lavender": (200, 176, 242),
    "pink": (250, 170, 204),
    "brown": (126, 80, 46),
    "beige": (236, 214, 172),
    "teal": (30, 148, 150),
}
UNNAMED_BACKGROUNDS = (
    *("white", "light gray", "light blue", "lavender", "pink", "beige", "light green"),
    *("yellow", "teal", "dark blue"),
)
TINTS: dict[str, Colour] = {
    "red": (226, 40, 44),
    "orange": (250, 130, 24),
    "yellow": (250, 208, 36),
    "green": (56, 176, 72),
    "blue": (44, 110, 236),
    "purple": (140, 70, 210),
    "pink": (250, 120, 180),
    "gray": (150, 150, 156),
}
TINT_NAMES = tuple(TINTS)
COLOUR_WORDS = frozenset(BACKGROUNDS) | frozenset(TINTS) | {"gold", "golden", "grey"}
PLACES: dict[str, tuple[int, int]] = {
    "in the top left corner": (64, 64),
    "at the top": (128, 64),
    "in the top right corner": (192, 64),
    "on the left": (64, 128),
    "in the center": (128, 128),
    "on the right": (192, 128),
    "in the bottom left corner": (64, 192),
    "at the bottom": (128, 192),
    "in the bottom right corner": (192, 192),
}
RELATIONS = ("to the left of", "to the right of", "next to", "and", "above", "below")
RELATION_WEIGHTS = (20, 20, 14, 16, 15, 15)
COUNTS = {2: "two", 3: "three", 4: "four"}
SIZE_OF_WORD = {"small": 96, "big": 256}
COUNT_SLOTS: dict[int, tuple[Slot, ...]] = {
    2: ((64, 128, 128), (192, 128, 128)),
    3: ((128, 64, 128), (64, 192, 128), (192, 192, 128)),
    4: ((64, 64, 128), (192, 64, 128), (64, 192, 128), (192, 192, 128)),
}
LEFT_RIGHT = ((64, 128, 128), (192, 128, 128))
TOP_BOTTOM = ((128, 64, 128), (128, 192, 128))
OPEN_SLOTS: tuple[Slot, ...] = (
    *((128, 128, 192), (112, 128, 192), (144, 128, 192), (128, 112, 192), (128, 144, 192)),
    *((x, y, 128) for x, y in PLACES.values()),
    (128, 128, 256),
)
SMALL_SLOTS: tuple[Slot, ...] = tuple((x, y, 96) for x, y in PLACES.values())
# Percent of the training images, by what the caption says and the size of the sprites.
SHARES: dict[tuple[Kind, int], int] = {
    ("one", 192): 24,
    ("one", 256): 9,
    ("one", 128): 5,
    ("place", 128): 8,
    ("place", 96): 4,
    ("small", 96): 4,
    ("big", 256): 7,
    ("pair", 128): 28,
    ("count", 128): 10,
    ("nothing", 192): 1,
}
CENTRE_SHARE = 0.7


class Thing(NamedTuple):
    """One of the 524: its names (the first is the one asked for in tests) and what suits it.

    `uncounted` names take no article; things named for a colour take no tint.
    """

    names: tuple[str, ...]
    plurals: tuple[str, ...]
    uncounted: tuple[bool, ...]
    tints: bool


class Sprite(NamedTuple):
    """One placed sprite: index of the thing, centre and size in pixels, tint (-1: none)."""

    concept: int
    x: int
    y: int
    size: int
    tint: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What is drawn, and which of it the caption will say.

    `background` names the colour of which `shade` is one; `says_background`, `place`, `size_word`
    and `relation` are what is said. A scene of kind "nothing" has a caption without a known word.
    """

    kind: Kind
    sprites: tuple[Sprite, ...]
    background: str
    shade: Colour
    says_background: bool = True
    place: str | None = None
    size_word: str | None = None
    relation: str | None = None


def load_things() -> list[Thing]:
    """The 524 things, as `fetch_art` wrote them."""
    entries = json.loads((DATA / "concepts.json").read_text(encoding="utf-8"))
    return [
        Thing(
            names=tuple(entry["names"]),
            plurals=tuple(entry["plurals"]),
            uncounted=tuple(entry["uncounted"]),
            tints=entry["tints"],
        )
        for entry in entries
    ]


def place_at(x: int, y: int) -> str:
    """The name of the place with this centre."""
    return next(name for name, centre in PLACES.items() if centre == (x, y))


def is_held_out(kind: str, first: int | str, second: int | str) -> bool:
    """Whether this combination is one of the 5 % that training never sees."""
    if kind == "pair":
        first, second = sorted((int(first), int(second)))
    return zlib.crc32(f"{kind}:{first}:{second}".encode()) % 20 == 0


def combinations(scene: Scene) -> list[tuple[str, int, int | str]]:
    """Every combination that the *picture* of a scene shows, whether or not the caption says it."""
    concepts = sorted({sprite.concept for sprite in scene.sprites})
    found: list[tuple[str, int, int | str]] = [
        ("background", concept, scene.background) for concept in concepts
    ]
    found += [("tint", s.concept, s.tint) for s in scene.sprites if s.tint >= 0]
    if len(concepts) == 2:
        found.append(("pair", concepts[0], concepts[1]))
    elif len(scene.sprites) > 1:
        found.append(("count", concepts[0], len(scene.sprites)))
    else:
        (sprite,) = scene.sprites
        if sprite.size <= 128:
            found.append(("place", sprite.concept, place_at(sprite.x, sprite.y)))
        if sprite.size in (96, 256):
            found.append(("size", sprite.concept, sprite.size))
    return found


def is_held_out_scene(scene: Scene) -> bool:
    """Whether any combination in the picture is held out."""
    return any(is_held_out(*combination) for combination in combinations(scene))


def slots(
    kind: Kind,
    *,
    count: int = 1,
    place: str | None = None,
    size_word: str | None = None,
    relation: str | None = None,
) -> list[tuple[Slot, ...]]:
    """For each thing in the order it is named, every slot that the caption leaves open for it."""
    if kind == "pair":
        first, second = TOP_BOTTOM if relation in ("above", "below") else LEFT_RIGHT
        if relation in ("to the right of", "below"):
            first, second = second, first
        return [(first,), (second,)]
    if kind == "count":
        return [(slot,) for slot in COUNT_SLOTS[count]]
    if place is not None:
        return [((*PLACES[place], 96 if size_word == "small" else 128),)]
    if kind == "small":
        return [SMALL_SLOTS]
    if kind == "big":
        return [((128, 128, 256),)]
    return [OPEN_SLOTS]


def nearest_background(colour: Sequence[float]) -> tuple[str, float]:
    """The name of the nearest palette colour, and its distance as a share of the second's."""
    distances = sorted(
        (sum((a - b) ** 2 for a, b in zip(colour, other, strict=True)) ** 0.5, name)
        for name, other in BACKGROUNDS.items()
    )
    return distances[0][1], distances[0][0] / max(distances[1][0], 1e-9)


def draw_shade(name: str, random: Random) -> Colour:
    """A colour that differs visibly from the palette's and is still clearly nearest to it."""
    base = BACKGROUNDS[name]
    while True:
        light = random.randint(-24, 24)
        red, green, blue = (
            max(0, min(255, value + light + random.randint(-8, 8))) for value in base
        )
        nearest, share = nearest_background((red, green, blue))
        if nearest == name and share < 0.55:
            return red, green, blue


def _draw_tint(thing: Thing, share: float, random: Random) -> int:
    return random.randrange(len(TINTS)) if thing.tints and random.random() < share else -1


def draw_slot(size: int, random: Random) -> Slot:
    """A slot of this size for a single thing; a large one is mostly in the centre."""
    if size == 192 and random.random() < CENTRE_SHARE:
        return (128, 128, 192)
    allowed = SMALL_SLOTS if size == 96 else OPEN_SLOTS
    return random.choice([slot for slot in allowed if slot[2] == size])


def _draw_single(kind: Kind, size: int, things: Sequence[Thing], random: Random) -> Parts:
    concept = random.randrange(len(things))
    x, y, _ = draw_slot(size, random)
    tint = _draw_tint(things[concept], 0.2, random) if kind != "nothing" else -1
    parts: Parts = {"kind": kind, "sprites": (Sprite(concept, x, y, size, tint),)}
    if kind == "place":
        parts["place"] = place_at(x, y)
    if kind != "one":
        parts["size_word"] = {96: "small", 256: "big"}.get(size)
    return parts


def _draw_pair(things: Sequence[Thing], random: Random) -> Parts:
    concepts = random.sample(range(len(things)), 2)
    relation = random.choices(RELATIONS, RELATION_WEIGHTS)[0]
    sprites = tuple(
        Sprite(concept, *slot, _draw_tint(things[concept], 0.1, random))
        for concept, (slot,) in zip(concepts, slots("pair", relation=relation), strict=True)
    )
    return {"kind": "pair", "sprites": sprites, "relation": relation}


def _draw_count(things: Sequence[Thing], random: Random) -> Parts:
    concept = random.randrange(len(things))
    tint = _draw_tint(things[concept], 0.12, random)
    count = random.choice(list(COUNTS))
    sprites = tuple(Sprite(concept, *slot, tint) for slot in COUNT_SLOTS[count])
    return {"kind": "count", "sprites": sprites}


def _draw_parts(kind: Kind, size: int, things: Sequence[Thing], random: Random) -> Parts:
    if kind == "pair":
        return _draw_pair(things, random)
    if kind == "count":
        return _draw_count(things, random)
    return _draw_single(kind, size, things, random)


def draw_scene(things: Sequence[Thing], random: Random) -> Scene:
    """A random scene that training may see: no combination in its picture is held out."""
    # Kind and size are drawn once: pairs, which are held out more often, keep their share.
    kind, size = random.choices(list(SHARES), list(SHARES.values()))[0]
    while True:
        says_background = random.random() < 0.75 and kind != "nothing"
        background = random.choice(list(BACKGROUNDS) if says_background else UNNAMED_BACKGROUNDS)
        scene = Scene(
            background=background,
            shade=draw_shade(background, random),
            says_background=says_background,
            **_draw_parts(kind, size, things, random),  # type: ignore[arg-type]
        )
        if not is_held_out_scene(scene):
            return scene
