"""Amounts of memory as people write them: `6GB`, `6GiB`, `6144MB`.

Memory is sold in powers of two, whatever the letters say: a card of 6 GB has 6 x 2^30 bytes.
"""

from __future__ import annotations

import re

from flux_nf4.errors import InputError

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_LONGEST_QUOTE = 60
_AMOUNT = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)\s*([KMGT])i?B?", re.IGNORECASE)


def parse_memory(text: str, label: str) -> int:
    """The bytes that `text` means; `label` names its source.

    Raises:
        InputError: it is no amount of memory, or a number without a unit.
    """
    text = " ".join(text.split())
    match = _AMOUNT.fullmatch(text)
    if match is not None and float(match[1]) > 0:
        return int(float(match[1]) * _UNITS[match[2].upper()])
    hint = "with a unit: `6GB`, `6GiB` and `6144MB` are the same"
    if len(text) <= _LONGEST_QUOTE and re.fullmatch(r"\d+(\.\d+)?", text):
        hint = f"`{text}GB`, or `{text}MB`?"
    raise InputError(
        f"`{label}` must be an amount of memory with its unit, got `{text[:_LONGEST_QUOTE]}`",
        hint=hint,
    )


def parse_limit(text: str | None, label: str) -> int | None:
    """The bytes that `text` allows; None where it is `auto`, or nothing was said.

    Raises:
        InputError: as `parse_memory`.
    """
    return None if text in (None, "auto") else parse_memory(str(text), label)


def memory_text(num_bytes: int) -> str:
    """Bytes of memory with two decimals: `4.51 GiB`; small ones in MiB."""
    if 0 < num_bytes < 2**30 / 10:
        return f"{num_bytes / 2**20:.0f} MiB"
    return f"{num_bytes / 2**30:.2f} GiB"
