"""What the built-in demo model was taught, and whether a prompt names any of it.

Its knowledge is a file made by the training recipe: `assets/demo/words.json`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from flux_nf4.errors import FormatError, ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_LISTS = ("backgrounds", "tints", "places", "relations", "counts", "sizes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """Each thing with its other names, and the words that say where, how many and on what."""

    things: Mapping[str, tuple[str, ...]]
    backgrounds: tuple[str, ...] = ()
    tints: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    relations: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()

    def unknown(self, prompts: Iterable[str]) -> list[str]:
        """Those of `prompts` that name none of the things: whole words count, and plurals too."""
        forms = {form for thing in self.things for form in self._forms(thing)}
        longest = max(map(len, forms), default=0)

        def names_a_thing(words: tuple[str, ...]) -> bool:
            return any(
                words[start:end] in forms
                for start in range(len(words))
                for end in range(start + 1, start + longest + 1)
            )

        return [prompt for prompt in prompts if not names_a_thing(_split(prompt))]

    def matching(self, text: str) -> dict[str, tuple[str, ...]]:
        """The things that hold `text` in one of their names."""
        wanted = text.casefold()
        return {
            thing: others
            for thing, others in self.things.items()
            if any(wanted in name.casefold() for name in (thing, *others))
        }

    def _forms(self, thing: str) -> Iterator[tuple[str, ...]]:
        for name in (thing, *self.things[thing]):
            words = _split(name)
            if words:
                yield words
                yield from ((*words[:-1], plural) for plural in _plurals(words[-1]))


def load_words() -> Words:
    """The built-in demo model's words.

    Raises:
        ModelNotFoundError: this installation has no demo model.
        FormatError: the file is not what the recipe writes.
    """
    file = resources.files("flux_nf4") / "assets" / "demo" / "words.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return Words(
            things={name: tuple(others) for name, others in values["things"].items()},
            **{name: tuple(values[name]) for name in _LISTS},
        )
    except FileNotFoundError as error:
        raise ModelNotFoundError(
            "this installation has no built-in demo model",
            hint="install flux-nf4 again, or name a model with `-m PATH`",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"the demo model's list of words is damaged: {error}", hint="install flux-nf4 again"
        ) from error


def _split(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^\W_]+", text.casefold()))


def _plurals(word: str) -> Iterator[str]:
    yield f"{word}s"
    if word.endswith(("s", "x", "z", "ch", "sh", "o")):
        yield f"{word}es"
    if word.endswith("y"):
        yield f"{word[:-1]}ies"
    if word.endswith("f"):
        yield f"{word[:-1]}ves"
    if word.endswith("fe"):
        yield f"{word[:-2]}ves"
