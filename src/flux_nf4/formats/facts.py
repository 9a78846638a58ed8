"""What a FLUX checkpoint needs beside its tensors, and what the tensors cannot tell.

FLUX.1's own files leave these to the reader's knowledge; ours write them, as JSON, into the
safetensors `__metadata__` under the key `flux_nf4`. Other readers ignore that key.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flux_nf4.errors import FormatError
from flux_nf4.formats.strictjson import parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping

METADATA_KEY = "flux_nf4"
_LARGEST = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Constants of one model; the defaults are FLUX.1-dev's.

    Sources: the `scheduler`, `vae` and `tokenizer` configurations of FLUX.1-dev on the Hub.
    `tokenizer` names a folder under `assets/tokenizers`; sizes are in pixels, lengths in tokens.

    Raises:
        FormatError: a value of the wrong type or out of range.
    """

    name: str = "flux1-dev"
    tokenizer: str = "flux1"
    clip_eos_token_id: int = 49407
    default_size: int = 1024
    max_sequence_length: int = 512
    vae_scaling_factor: float = 0.3611
    vae_shift_factor: float = 0.1159
    vae_norm_num_groups: int = 32
    use_dynamic_shifting: bool = True
    shift: float = 3.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    licence: str = "FLUX.1 [dev] Non-Commercial License"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            problem = _problem(field.name, type(field.default), value)
            if problem:
                raise FormatError(f"`{field.name}` must be {problem}, got {value!r:.80}")

    def to_metadata(self) -> dict[str, str]:
        """The `__metadata__` entry that carries these facts."""
        return {METADATA_KEY: json.dumps(dataclasses.asdict(self), sort_keys=True)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Facts | None:
        """Read what `to_metadata` wrote; None where the file carries no such entry.

        Raises:
            FormatError: the entry is not JSON, or names, types or ranges are not those of `Facts`.
        """
        text = metadata.get(METADATA_KEY)
        if text is None:
            return None
        what = f"metadata `{METADATA_KEY}`"
        values = parse_json(text.encode(), what)
        if not isinstance(values, dict):
            raise FormatError(f"{what} must hold a JSON object, got {values!r:.80}")
        types = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - types.keys())
        if unknown:
            raise FormatError(f"{what} holds unknown entries: {', '.join(unknown[:8])!r}")
        for name, value in values.items():
            if types[name] is float and type(value) is int and abs(value) < _LARGEST:
                values[name] = float(value)
        try:
            return cls(**values)
        except FormatError as error:
            raise FormatError(f"{what}: {error.message}", hint=error.hint) from error


def _problem(name: str, kind: type, value: object) -> str | None:
    if type(value) is not kind:
        return kind.__name__
    if isinstance(value, str) and not value.isprintable():
        return "printable"
    if name == "tokenizer" and not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", str(value)):
        return "a plain name, of small letters and digits"
    may_be_zero = ("clip_eos_token_id", "base_shift", "max_shift", "vae_shift_factor")
    if isinstance(value, int | float) and kind is not bool:
        # Written so that NaN, which compares as false, is refused.
        if not abs(value) < _LARGEST or (value < 0 and name != "vae_shift_factor"):
            return "positive and of a sensible size"
        if value == 0 and name not in may_be_zero:
            return "positive"
    return None


FLUX_1_DEV = Facts()
FLUX_1_SCHNELL = Facts(
    name="flux1-schnell",
    max_sequence_length=256,
    use_dynamic_shifting=False,
    shift=1.0,
    licence="Apache-2.0",
)
