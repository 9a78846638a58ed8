"""The prompts that the model is judged by: `data/prompts.json.gz`, and their token ids.

    python -m training.prompts             seconds: ids of the committed prompts, `work/prompts.npz`
    python -m training.prompts --redraw    some minutes: other prompts, where anything has changed

    test     2,004 prompts; each shows a combination that training never sees
    val      384 of other combinations, to choose settings by
    unknown  200 prompts with one to three words, never seen in training, that name nothing
    grid     32 from the grammar, for the eye
    free     32 as people write them, for the eye

`test` and `val` have seven parts, named by `set`: thing (all 524, light gray), background (30 for
each of 18), count, place, pair, tint, size. Where a measure would fail on a perfect picture (a
white ghost on white, in some shade), another is drawn; `ceiling` is what exact scenes score.
"""

from __future__ import annotations

import argparse
import gzip
import json
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from training import DATA, WORK
from training.captions import plain_caption, unknown_caption, unknown_words
from training.compose import Composer, load_sprites
from training.dataset import encode, fits
from training.grammar import (
    BACKGROUNDS,
    COUNTS,
    PLACES,
    RELATIONS,
    SIZE_OF_WORD,
    TINTS,
    Scene,
    Sprite,
    Thing,
    draw_scene,
    draw_shade,
    is_held_out,
    load_things,
    slots,
)
from training.measures import Measures, slots_of, summary

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Spec = dict[str, Any]
FILE = DATA / "prompts.json.gz"
TEST_SIZES = {"background": 30, "count": 60, "place": 20, "pair": 50, "tint": 20, "size": 60}
VAL_SIZES = {"background": 6, "count": 16, "place": 4, "pair": 18, "tint": 4, "size": 8}
NUM_VAL_THINGS = 36
# Of pictures in [-1, 1]: about what a good model adds.
CHECK_NOISE = 0.04
UNKNOWN_SIZES = {"single": 150, "pair": 30, "count": 20}

GRID = (
    "a red apple on a light blue background",
    "a cat",
    "a dog on a green background",
    "a small rocket in the top left corner on a dark blue background",
    "two bananas side by side",
    "a pizza and a mug of beer",
    "a blue elephant on a yellow background",
    "a unicorn, pink background",
    "a 3d render of a guitar",
    "an owl above a mushroom on a beige background",
    "three strawberries on white",
    "a huge burger on an orange background",
    "a purple tiger",
    "a skull to the left of a pumpkin on black",
    "a penguin",
    "four stars on a dark blue background",
    "a tiny butterfly in the bottom right corner",
    "a lion and a crown on a teal background",
    "a robot on gray",
    "a castle",
    "a fire truck to the right of a house on a light green background",
    "a pink dinosaur on a purple background",
    "an astronaut on black",
    "a cactus on a beige background",
    "a happy face",
    "a trophy on a red background",
    "a sailboat above a whale on a light blue background",
    "a green fox",
    "a birthday cake on a lavender background",
    "a laptop next to a cup of coffee on brown",
    "an octopus on a yellow background",
    "a rainbow on a white background",
)
FREE = (
    "a cute cat",
    "a photo of a dog, high quality, 4k",
    "Astronaut in a jungle, cold color palette, muted colors",
    "a cat wearing sunglasses",
    "a beautiful cat on a lavender background",
    "A Fluffy Panda.",
    "robot",
    "cat.",
    "a cat and a dog",
    "a majestic lion, golden hour, cinematic lighting, masterpiece",
    "an old rusty car in the desert",
    "a delicious pizza with extra cheese",
    "cute little penguin, kawaii style, pastel",
    "a dragon breathing flames over a medieval village",
    "a steaming cup of coffee on a wooden table",
    "portrait of a wizard, trending on artstation",
    "two happy dogs playing",
    "a spaceship landing on mars",
    "a rose, watercolor",
    "my grandmother's teapot",
    "a shiny new bicycle leaning against a wall",
    "an elephant in the savanna at sunset",
    "a birthday cake with many candles",
    "octopus playing the drums",
    "a tiny house in the woods, isometric, unreal engine",
    "sunflower field, impressionist painting",
    "a snowman melting in July",
    "a vampire at the beach, film still",
    "a bowl of fresh strawberries",
    "a sleepy koala on a tree branch, national geographic",
    "butterfly, macro photography, bokeh",
    "the coolest t-rex ever on a yellow background",
)


def spec_of(scene: Scene, caption: str, name: str) -> Spec:
    """What the measures need to know of a scene, without what its caption leaves open."""
    spec: Spec = {
        "set": name,
        "kind": scene.kind,
        "caption": caption,
        "background": scene.background,
        "objects": [[sprite.concept, sprite.tint] for sprite in scene.sprites],
    }
    said = {"place": scene.place, "size_word": scene.size_word, "relation": scene.relation}
    return spec | {key: value for key, value in said.items() if value is not None}


def exact_scenes(specs: Sequence[Spec], random: Random) -> tuple[torch.Tensor, torch.Tensor]:
    """For each spec one scene that fulfils it, what it leaves open drawn at random: objs, bg."""
    objs = torch.full((len(specs), 4, 5), -1, dtype=torch.long)
    shades = []
    for index, spec in enumerate(specs):
        for row, ((concept, tint), allowed) in enumerate(
            zip(spec["objects"], slots_of(spec), strict=True)
        ):
            objs[index, row] = torch.tensor([concept, *random.choice(allowed), tint])
        shades.append(draw_shade(spec["background"], random))
    return objs, torch.tensor(shades, dtype=torch.uint8)


class PromptWriter:
    """Draws prompts whose combinations are all held out (`held_out`) or all not."""

    def __init__(
        self,
        things: Sequence[Thing],
        measures: Measures,
        random: Random,
        *,
        held_out: bool,
        num_checks: int = 4,
    ) -> None:
        self.things = things
        self.measures = measures
        self.random = random
        self.held_out = held_out
        self.num_checks = num_checks

    def concept(self, kind: str, value: int | str) -> int:
        """A thing that makes, with `value`, a combination of the wanted sort."""
        while True:
            concept = self.random.randrange(len(self.things))
            fits_tint = kind != "tint" or self.things[concept].tints
            if fits_tint and is_held_out(kind, concept, value) == self.held_out:
                return concept

    def pair(self) -> tuple[int, int]:
        """Two things that make a pair of the wanted sort."""
        while True:
            first, second = self.random.sample(range(len(self.things)), 2)
            if is_held_out("pair", first, second) == self.held_out:
                return first, second

    def spec(self, name: str, concepts: Sequence[int], **said: Any) -> Spec:
        """A spec by its plain caption; `said` are fields of `Scene`, and `tint`."""
        tint = said.pop("tint", -1)
        background = said.pop("background", None) or self.random.choice(list(BACKGROUNDS))
        options = {key: said[key] for key in ("place", "size_word", "relation") if key in said}
        allowed = slots(said["kind"], count=len(concepts), **options)
        sprites = tuple(
            Sprite(concept, *places[0], tint)
            for concept, places in zip(concepts, allowed, strict=True)
        )
        shade = BACKGROUNDS[background]
        scene = Scene(sprites=sprites, background=background, shade=shade, **said)
        return spec_of(scene, plain_caption(scene, self.things), name)

    def collect(self, num_specs: int, draw: Callable[[], Spec]) -> list[Spec]:
        """`num_specs` drawn specs that the measures judge rightly on every of a few scenes."""
        specs: list[Spec] = []
        while len(specs) < num_specs:
            drawn = [draw() for _ in range(num_specs - len(specs))]
            for _ in range(self.num_checks):
                drawn = self.judged_rightly(drawn)
            specs += drawn
        return specs

    def judged_rightly(self, specs: list[Spec]) -> list[Spec]:
        """Those of the specs that are right on one scene of each, with a little noise."""
        if not specs:
            return []
        images = self.measures.composer(*exact_scenes(specs, self.random))
        generator = torch.Generator().manual_seed(self.random.randrange(2**32))
        images = images + CHECK_NOISE * torch.randn(images.shape, generator=generator)
        results = self.measures(images, specs)
        return [
            spec
            for spec, result in zip(specs, results, strict=True)
            if result["right"] and result["right_background"]
        ]

    def background_spec(self, background: str) -> Spec:
        """A single thing, a thing at a place, a pair or a count on a held-out background."""
        concept = self.concept("background", background)
        choice = self.random.randrange(6)
        if choice < 3:
            return self.spec("background", [concept], kind="one", background=background)
        if choice == 3:
            place = self.random.choice(list(PLACES))
            return self.spec(
                "background", [concept], kind="place", place=place, background=background
            )
        if choice == 4:
            others = [other for other in range(len(self.things)) if other != concept]
            concepts = [concept, self.random.choice(others)]
            relation = self.random.choice(RELATIONS)
            return self.spec(
                "background", concepts, kind="pair", relation=relation, background=background
            )
        concepts = [concept] * self.random.choice(list(COUNTS))
        return self.spec("background", concepts, kind="count", background=background)

    def write(self, sizes: dict[str, int], concepts: Sequence[int]) -> list[Spec]:
        """All seven sets; `sizes` counts the prompts for each colour, count, place, ..."""
        specs = [
            self.spec("thing", [concept], kind="one", background="light gray")
            for concept in concepts
        ]
        for name in BACKGROUNDS:
            specs += self.collect(sizes["background"], lambda n=name: self.background_spec(n))
        for count in COUNTS:
            specs += self.collect(
                sizes["count"],
                lambda c=count: self.spec("count", [self.concept("count", c)] * c, kind="count"),
            )
        for place in PLACES:
            specs += self.collect(
                sizes["place"],
                lambda p=place: self.spec(
                    "place", [self.concept("place", p)], kind="place", place=p
                ),
            )
        for relation in RELATIONS:
            specs += self.collect(
                sizes["pair"],
                lambda r=relation: self.spec("pair", self.pair(), kind="pair", relation=r),
            )
        for tint in range(len(TINTS)):
            specs += self.collect(
                sizes["tint"],
                lambda t=tint: self.spec("tint", [self.concept("tint", t)], kind="one", tint=t),
            )
        for word, size in SIZE_OF_WORD.items():
            specs += self.collect(
                sizes["size"],
                lambda w=word, s=size: self.spec(
                    "size", [self.concept("size", s)], kind=w, size_word=w
                ),
            )
        return specs


def unknown_specs(things: Sequence[Thing], random: Random) -> list[Spec]:
    """Prompts with one to three words that no training caption carries and that name nothing."""
    words = unknown_words(held_out=True)
    wanted = dict(UNKNOWN_SIZES)
    specs = []
    while sum(wanted.values()):
        scene = draw_scene(things, random)
        group = scene.kind if scene.kind in wanted else "single"
        tinted = any(sprite.tint >= 0 for sprite in scene.sprites)
        if scene.kind == "nothing" or tinted or not wanted[group]:
            continue
        text = unknown_caption(scene, things, random, words, max_words=3)
        if fits(text):
            specs.append(spec_of(scene, text, "unknown"))
            wanted[group] -= 1
    return specs


def load_prompts() -> dict[str, Any]:
    """The committed prompts."""
    return json.loads(gzip.decompress(FILE.read_bytes()))


def write_tokens(prompts: dict[str, Any]) -> None:
    """Write `work/prompts.npz`: `<set>_t5` and `<set>_clip`, int16 [n, 32] each."""
    arrays = {}
    for name in ("test", "val", "unknown", "grid", "free"):
        captions = [
            entry if isinstance(entry, str) else entry["caption"] for entry in prompts[name]
        ]
        arrays[f"{name}_t5"], arrays[f"{name}_clip"] = encode(captions)
    WORK.mkdir(exist_ok=True)
    np.savez_compressed(WORK / "prompts.npz", **arrays)


def draw_prompts() -> dict[str, Any]:
    """Draw the prompts, and measure exact scenes of them."""
    things = load_things()
    measures = Measures(Composer(load_sprites()))
    random = Random(6)
    test = PromptWriter(things, measures, random, held_out=True)
    val = PromptWriter(things, measures, random, held_out=False)
    prompts: dict[str, Any] = {
        "test": test.write(TEST_SIZES, range(len(things))),
        "val": val.write(VAL_SIZES, random.sample(range(len(things)), NUM_VAL_THINGS)),
        "unknown": unknown_specs(things, random),
        "grid": list(GRID),
        "free": list(FREE),
    }
    prompts["ceiling"] = {}
    for name in ("test", "val", "unknown"):
        specs = prompts[name]
        results = []
        for start in range(0, len(specs), 64):
            part = specs[start : start + 64]
            results += measures(measures.composer(*exact_scenes(part, random)), part)
        prompts["ceiling"][name] = summary(specs, results)
        print(name, len(specs), prompts["ceiling"][name])
    return prompts


def main() -> None:
    """Write the ids, and with `--redraw` first the prompts.

    Drawn again they differ a little also where nothing has changed: whether a measure holds on a
    perfect picture depends on the last bits of this machine's arithmetic.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--redraw", action="store_true", help="draw other prompts, and keep them")
    if parser.parse_args().redraw:
        FILE.write_bytes(gzip.compress(json.dumps(draw_prompts()).encode(), mtime=0))
    write_tokens(load_prompts())


if __name__ == "__main__":
    main()
