"""`flux-nf4 demo`: what the built-in demo model can draw."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flux_nf4.cli.console import print_data, print_json, print_note, styled
from flux_nf4.cli.options import argument
from flux_nf4.cli.verb import Verb, debug_option, json_option
from flux_nf4.cli.words import Words, load_words

if TYPE_CHECKING:
    from collections.abc import Sequence

EXAMPLES = (
    'flux-nf4 generate "a red apple on a light blue background"',
    'flux-nf4 generate "a dog to the left of a cat" -n 4',
)
_LISTS = {
    "counts": "How many",
    "sizes": "How large",
    "tints": "In which colour",
    "places": "Where",
    "relations": "Two things",
    "backgrounds": "Backgrounds",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """The options of `demo`."""

    filter: str | None = argument("FILTER", help="only things with this in one of their names")
    json: bool = json_option()
    debug: bool = debug_option()


def run(options: DemoOptions) -> int:
    """List the demo model's words, or those things that match a filter."""
    words = load_words()
    if options.filter is not None:
        words = dataclasses.replace(words, things=words.matching(options.filter))
    if options.json:
        print_json(dataclasses.asdict(words), indent=2)
    elif options.filter is not None:
        _print_matches(words, options.filter)
    else:
        _print_all(words)
    return 0


def _print_matches(words: Words, text: str) -> None:
    for thing, others in words.things.items():
        print_data(f"{thing} ({', '.join(others)})" if others else thing)
    if not words.things:
        print_note(f"the demo model knows no `{text}`; `flux-nf4 demo` lists what it knows")


def _print_all(words: Words) -> None:
    print_data(styled(f"Things ({len(words.things)}), in most cases under other names too", "bold"))
    for line in in_columns(sorted(words.things, key=str.casefold)):
        print_data(line)
    print_data("")
    for name, title in _LISTS.items():
        print_data(f"{styled(f'{title}:', 'bold')} {', '.join(getattr(words, name))}")
    print_data("")
    print_data(styled("Try", "bold"))
    for example in EXAMPLES:
        print_data(f"  {example}")


def in_columns(names: Sequence[str]) -> list[str]:
    """`names` in columns that fill the terminal's width, reading downwards."""
    if not names:
        return []
    width = max(map(len, names)) + 2
    # A last column needs no gap after it.
    num_columns = max(1, (shutil.get_terminal_size().columns + 2) // width)
    num_rows = -(-len(names) // num_columns)
    rows = [names[row::num_rows] for row in range(num_rows)]
    return ["".join(f"{name:<{width}}" for name in row).rstrip() for row in rows]


VERB = Verb(
    name="demo",
    summary="List what the built-in demo model can draw.",
    options=DemoOptions,
    run=run,
    examples=("", "cat"),
)
