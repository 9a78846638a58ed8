"""Captions: how people might ask for a scene, with words in them that the model need not know.

A caption says what the scene says and leaves the rest open. A share of them (25 % of single
things, 20 % of counts, 6 % of pairs, where they hurt most) carries words that name nothing the
model draws: adjectives, other English words, made-up ones, the tails of prompts found everywhere.
Without them "a cute cat" is a blob. A tenth of these words, by hash, never appears in training:
the evaluation's unknown words are of that tenth.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from training import DATA
from training.grammar import (
    BACKGROUNDS,
    COLOUR_WORDS,
    COUNTS,
    TINT_NAMES,
    Scene,
    Thing,
    load_things,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

PREFIXES = (
    *("a 3d render of ", "an icon of ", "a picture of ", "an illustration of ", "a photo of "),
    *("an emoji of ", "a drawing of ", "an image of ", "photo of ", "a painting of "),
    *("portrait of ", "a portrait of ", "a close-up of ", "a cartoon of ", "a sticker of "),
)
SIZE_WORDS = {
    "small": ("small", "small", "tiny", "little"),
    "big": ("big", "big", "large", "huge", "giant"),
}
# Other ways to say a place or a relation; said in one caption of five.
OTHER_PLACES = {
    "in the top left corner": ("top left", "in the upper left corner"),
    "at the top": ("at the top of the image", "top"),
    "in the top right corner": ("top right", "in the upper right corner"),
    "on the left": ("on the left side", "left"),
    "in the center": ("in the middle", "in the centre"),
    "on the right": ("on the right side", "right"),
    "in the bottom left corner": ("bottom left", "in the lower left corner"),
    "at the bottom": ("at the bottom of the image", "bottom"),
    "in the bottom right corner": ("bottom right", "in the lower right corner"),
}
OTHER_RELATIONS = {
    "to the left of": ("left of", "on the left of"),
    "to the right of": ("right of", "on the right of"),
    "next to": ("beside", "near", "by"),
    "and": ("with", "with", "and also", "wearing", "holding", "in"),
    "above": ("over", "on top of", "on"),
    "below": ("under", "beneath", "underneath"),
}
BACKGROUND_FORMS = (
    *(" on {a} {b} background", " on {a} {b} background", " on {b}", ", {b} background"),
    *(" against {a} {b} background", " in front of {a} {b} background"),
)
FIXED_TAILS = (
    *(", high quality", ", high quality, 4k", ", 4k", ", 8k, highly detailed", ", 3d style"),
    *(", digital art", ", detailed", ", masterpiece", ", best quality", " please", ", hd"),
    *(", soft light", ", studio lighting", ", octane render", ", trending on artstation"),
    *(", photorealistic", ", emoji style", ", cinematic", ", ultra realistic", ", cartoon"),
)
FIXED_LEADS = ("masterpiece, ", "best quality, ", "high quality ", "my ", "this is ", "i want ")
TAILS = (
    *(", {w}", ", {w} {w}", " in the {w}", " in a {w}", " with {w}", " with a {w}", " {w}"),
    *(" wearing {w}", " wearing a {w}", ", {w} color palette", ", {w} colors", ", {w} style"),
    *(" at the {w}", " near the {w}", " from {w}", " made of {w}", " {w} a {w}", " on a {w}"),
    *(" for {w}", " and a {w}", " is {w}", " {w} in the {w}", ", {w}, {w}", " and {w}"),
    *(" in {w}", ", {w} lighting", " on the {w}", " of {w}", ", {w} {w} {w}", " by {w}"),
)
LEADS = ("{w}, ", "{w} of ", "a {w} with ", "a {w} holding ", "a {w} of ", "{w} {w}, ", "{w} a ")
UNKNOWN_ONLY = ("a {w}", "{w}", "the {w} of {w}", "a {w} {w}", "{w} {w}", "{w} {w} {w}")
UNKNOWN_SHARE = {"count": 0.20, "pair": 0.06}
UNKNOWN_SHARE_SINGLE = 0.25
ONSETS = (*"bcdfghjklmnprstvwz", "st", "tr", "gl", "br", "ch", "sh")
NUCLEI = (*"aeiou", "ai", "ee", "oo", "ar", "er", "or", "un", "il", "et", "an")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownWords:
    """A supply of words that name nothing: those of training, or the tenth held out from it."""

    adjectives: tuple[str, ...]
    others: tuple[str, ...]
    known: frozenset[str]
    held_out: bool

    def draw(self, random: Random) -> str:
        """One word: an adjective, any other English word, or one made up on the spot."""
        share = random.random()
        if share < 0.33:
            return random.choice(self.adjectives)
        if share < 0.90:
            return random.choice(self.others)
        while True:
            syllables = range(random.randint(1, 3))
            word = "".join(random.choice(ONSETS) + random.choice(NUCLEI) for _ in syllables)
            if word not in self.known and is_held_out_word(word) == self.held_out:
                return word


def is_held_out_word(word: str) -> bool:
    """Whether a word is of the tenth that no training caption carries."""
    return zlib.crc32(f"word:{word}".encode()) % 10 == 0


def template_words() -> set[str]:
    """The words of the templates themselves, which training sees however they hash."""
    templates = (*PREFIXES, *FIXED_TAILS, *FIXED_LEADS, *TAILS, *LEADS, *UNKNOWN_ONLY)
    return set(re.findall(r"[a-z0-9-]+", " ".join(templates).replace("{w}", "")))


@cache
def unknown_words(*, held_out: bool) -> UnknownWords:
    """The words of `data/unknown_words.txt`: those for training, or those held out from it."""
    sections: dict[str, list[str]] = {"adjectives": [], "others": []}
    seen = template_words()
    section = ""
    for line in (DATA / "unknown_words.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            words = (word for word in line.split() if is_held_out_word(word) == held_out)
            sections[section] += (word for word in words if not (held_out and word in seen))
    return UnknownWords(
        adjectives=tuple(sections["adjectives"]),
        others=tuple(sections["others"]),
        known=frozenset(known_words(load_things())),
        held_out=held_out,
    )


def with_article(phrase: str) -> str:
    """`a` or `an`, by the first letter, which suffices for the names at hand."""
    is_vowel = phrase[0] in "aeiou" and not phrase.startswith(("uni", "ufo", "one", "eu"))
    return f"{'an' if is_vowel else 'a'} {phrase}"


def noun_phrase(thing: Thing, random: Random, *, words: Sequence[str] = (), tint: int = -1) -> str:
    """A thing by one of its names, `words` before it, with an article or without."""
    index = 0
    if len(thing.names) > 1 and random.random() < 0.4:
        index = random.randrange(1, len(thing.names))
    colour = (TINT_NAMES[tint],) if tint >= 0 else ()
    phrase = " ".join((*words, *colour, thing.names[index]))
    share = random.random()
    if share < 0.12:
        return phrase
    if thing.uncounted[index]:
        return f"some {phrase}" if share < 0.4 else phrase
    return f"the {phrase}" if share < 0.15 else with_article(phrase)


def plain_phrase(thing: Thing, *, word: str = "", tint: int = -1) -> str:
    """A thing by its first name, as the evaluation asks for it."""
    colour = TINT_NAMES[tint] if tint >= 0 else ""
    phrase = " ".join(part for part in (word, colour, thing.names[0]) if part)
    return phrase if thing.uncounted[0] else with_article(phrase)


def plain_caption(scene: Scene, things: Sequence[Thing]) -> str:
    """The one caption of a scene without any variation, for the evaluation."""
    sprites = scene.sprites
    if scene.kind == "count":
        colour = f"{TINT_NAMES[sprites[0].tint]} " if sprites[0].tint >= 0 else ""
        text = f"{COUNTS[len(sprites)]} {colour}{things[sprites[0].concept].plurals[0]}"
    else:
        word = scene.size_word or ""
        phrases = [plain_phrase(things[s.concept], word=word, tint=s.tint) for s in sprites]
        text = f" {scene.relation} ".join(phrases)
    text += f" {scene.place}" if scene.place else ""
    if scene.says_background:
        text += f" on {with_article(scene.background)} background"
    return text


def _fill(template: str, words: UnknownWords, random: Random) -> str:
    while "{w}" in template:
        template = template.replace("{w}", words.draw(random), 1)
    return template


def _say_background(scene: Scene, random: Random) -> str:
    if not scene.says_background:
        return ""
    name = scene.background
    if "gray" in name and random.random() < 0.2:
        name = name.replace("gray", "grey")
    article = "an" if name[0] in "aeiou" else "a"
    return random.choice(BACKGROUND_FORMS).format(a=article, b=name)


def _say_subject(
    scene: Scene, things: Sequence[Thing], random: Random, adjectives: Sequence[str]
) -> str:
    """What is there and where; `adjectives` go to the first or the second thing."""
    sprites = scene.sprites
    if scene.kind == "count":
        colour = (TINT_NAMES[sprites[0].tint],) if sprites[0].tint >= 0 else ()
        plurals = things[sprites[0].concept].plurals
        name = plurals[0] if random.random() < 0.7 else random.choice(plurals)
        text = " ".join((COUNTS[len(sprites)], *adjectives, *colour, name))
        return text + (" side by side" if len(sprites) == 2 and random.random() < 0.3 else "")
    phrases = []
    owner = random.randrange(len(sprites))
    for index, sprite in enumerate(sprites):
        words = list(adjectives) if index == owner else []
        if scene.size_word:
            size_word = random.choice(SIZE_WORDS[scene.size_word])
            words.insert(random.randint(0, len(words)), size_word)
        thing = things[sprite.concept]
        phrases.append(noun_phrase(thing, random, words=words, tint=sprite.tint))
    relation = scene.relation
    if relation and random.random() < 0.2:
        relation = random.choice(OTHER_RELATIONS[relation])
    text = f" {relation} ".join(phrases)
    if scene.place:
        other = random.random() < 0.2
        text += f" {random.choice(OTHER_PLACES[scene.place]) if other else scene.place}"
    return text


def _embellish(
    scene: Scene,
    things: Sequence[Thing],
    random: Random,
    words: UnknownWords,
    *,
    max_words: int,
    fixed: bool,
) -> str:
    """A caption that carries one to `max_words` unknown words, in one or two places."""
    budget = random.randint(1, max_words)
    num_adjectives = random.choice((0, 0, 1, 1, 2)) if budget > 1 else random.choice((0, 1))
    num_adjectives = min(num_adjectives, budget)
    adjectives = [words.draw(random) for _ in range(num_adjectives)]
    subject = _say_subject(scene, things, random, adjectives)
    background = _say_background(scene, random)
    rest = budget - num_adjectives
    if rest == 0:
        return subject + background
    if random.random() < 0.1:
        leads = [lead for lead in LEADS if lead.count("{w}") <= rest]
        return _fill(random.choice(leads), words, random) + subject + background
    tails = [tail for tail in TAILS if tail.count("{w}") <= rest]
    tail = _fill(random.choice(tails), words, random)
    if fixed and random.random() < 0.3:
        tail = random.choice(FIXED_TAILS)
    if not scene.says_background and random.random() < 0.05:
        tail = _fill(" on a {w} background", words, random)
    return subject + (tail + background if random.random() < 0.4 else background + tail)


def unknown_caption(
    scene: Scene, things: Sequence[Thing], random: Random, words: UnknownWords, *, max_words: int
) -> str:
    """A caption in which one to `max_words` of `words` stand, and no other unknown ones."""
    return _embellish(scene, things, random, words, max_words=max_words, fixed=False)


def caption(scene: Scene, things: Sequence[Thing], random: Random, *, known: bool = False) -> str:
    """One way to say a scene; with `known`, without words that the model need not know."""
    words = unknown_words(held_out=False)
    if scene.kind == "nothing":
        return _fill(random.choice(UNKNOWN_ONLY), words, random)
    share = UNKNOWN_SHARE.get(scene.kind, UNKNOWN_SHARE_SINGLE)
    bare = scene.kind == "one" and scene.sprites[0].tint < 0 and random.random() < 0.2
    if not known and random.random() < share:
        max_words = 2 if scene.kind == "pair" else 4
        text = _embellish(scene, things, random, words, max_words=max_words, fixed=True)
        text = random.choice(FIXED_LEADS) + text if random.random() < 0.06 else text
    elif bare:
        text = random.choice(things[scene.sprites[0].concept].names)
        text += _say_background(scene, random)
    else:
        text = _say_subject(scene, things, random, ()) + _say_background(scene, random)
    if random.random() < 0.2:
        text = random.choice(PREFIXES) + text
    return text + random.choice(".....!") if random.random() < 0.06 else text


def known_words(things: Sequence[Thing]) -> set[str]:
    """Every word that means something in a caption: names, colours, places, numbers, relations."""
    phrases = [*BACKGROUNDS, *COLOUR_WORDS, *COUNTS.values(), *OTHER_PLACES, *OTHER_RELATIONS]
    for group in (*OTHER_PLACES.values(), *OTHER_RELATIONS.values(), *SIZE_WORDS.values()):
        phrases += group
    phrases += [name for thing in things for name in (*thing.names, *thing.plurals)]
    phrases += [*FIXED_LEADS, "background against in front of", "side by side", "some the a an"]
    return {word for phrase in phrases for word in phrase.replace(",", "").split()}


def vocabulary(things: Sequence[Thing]) -> dict[str, object]:
    """What can be asked for, for the command line to list and to look a prompt's words up in."""
    return {
        "things": {
            thing.names[0]: sorted({*thing.names[1:], *thing.plurals} - {thing.names[0]})
            for thing in things
        },
        "backgrounds": list(BACKGROUNDS),
        "tints": list(TINT_NAMES),
        "places": list(OTHER_PLACES),
        "relations": list(OTHER_RELATIONS),
        "counts": list(COUNTS.values()),
        "sizes": sorted({word for words in SIZE_WORDS.values() for word in words}),
    }
