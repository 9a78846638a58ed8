"""Changes a JSON text into a wrong one that is still JSON: bytes changed blindly seldom are.

A node is replaced by an odd value or by a word of the target's language, removed, doubled, or given
another node's value; a key gets another name.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

ODD_VALUES = (None, True, -1, 0, 1, 2, 3, 64, 0.5, 1e300, 2**31, 2**62, 2**63, 2**64, "", [], {})

Place = tuple[Any, Any]  # a list or an object, and an index or a key in it


def places(value: Any) -> Iterator[Place]:
    """Every place inside a JSON value that holds another one."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def mutate(value: Any, words: tuple[str, ...], chance: random.Random) -> None:
    """Change a list or object in one place."""
    found = list(places(value))
    if not found:
        return
    (inside, key), (other, other_key) = chance.choice(found), chance.choice(found)
    action = chance.randrange(5)
    if action == 0:
        inside[key] = copy.deepcopy(chance.choice(ODD_VALUES))
    elif action == 1:
        inside[key] = chance.choice(words)
    elif action == 2:
        inside[key] = copy.deepcopy(other[other_key])
    elif action == 3:
        del inside[key]
    elif isinstance(inside, dict):
        inside[chance.choice((*words, str(other_key)))] = inside.pop(key)
    else:
        inside.append(copy.deepcopy(inside[key]))


def mutated_json(data: bytes, words: tuple[str, ...], seed: int) -> bytes | None:
    """Another JSON text near `data`; None if that is no list or object."""
    chance = random.Random(seed)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict | list):
        return None
    for _ in range(chance.randint(1, 3)):
        mutate(value, words, chance)
    return json.dumps(value, separators=(",", ":")).encode()
