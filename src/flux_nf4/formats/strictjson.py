"""JSON from files that may lie: what the standard parser lets through, this one refuses.

Doubled keys (the last one wins elsewhere, so that two readers may see two files), NaN and
Infinity, invalid UTF-8, and nesting deep enough to exhaust the stack.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any, NoReturn

from flux_nf4.errors import FormatError

if TYPE_CHECKING:
    from pathlib import Path

MAX_CONFIG_BYTES = 4_000_000  # the largest index.json of a FLUX folder has 0.1 MB


def parse_json(data: bytes, what: str) -> Any:
    """Parse `data` strictly; `what` names it in the message.

    Raises:
        FormatError: not UTF-8, not JSON, or one of the oddities that the module names.
    """

    def reject_doubled(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            doubled = next(key for key, count in counts.items() if count > 1)
            raise FormatError(f"{what} holds the key {doubled!r} twice")
        return values

    def reject_constant(text: str) -> NoReturn:
        raise FormatError(f"{what} holds {text}, which is not JSON")

    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=reject_doubled,
            parse_constant=reject_constant,
        )
    except UnicodeDecodeError as error:
        raise FormatError(f"{what} is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise FormatError(f"{what} nests too deeply") from error
    except ValueError as error:
        raise FormatError(f"{what} is not JSON: {error}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a small JSON file that must hold an object.

    Raises:
        FormatError: too large, unreadable, or not a JSON object.
    """
    what = f"`{path}`"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise FormatError(f"{what} cannot be read: {error.strerror}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise FormatError(f"{what} has more than {MAX_CONFIG_BYTES} bytes, too many for JSON here")
    value = parse_json(data, what)
    if not isinstance(value, dict):
        raise FormatError(f"{what} must hold a JSON object, got {type(value).__name__}")
    return value
