"""From prompts to token numbers, with the `tokenizers` library alone.

An all-in-one file carries no tokenizer, so the package does: FLUX.1's T5 and CLIP vocabularies
under `flux1`, the demo model's under `demo`, each a gzipped `tokenizer.json`. A Diffusers folder
brings its own. Padding, truncation and the end mark are done here and not by the library's
post-processors, so that every source gives Diffusers' numbers and what was cut off is known.
"""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from flux_nf4.errors import FormatError, InputError, ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer
    from torch import Tensor

    from flux_nf4.formats.checkpoint import Checkpoint

EncoderKind: TypeAlias = Literal["t5", "clip"]

CLIP_LENGTH = 77
MAX_TOKENIZER_BYTES = 64 * 2**20  # FLUX.1's T5 file is 2.4 MB
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizers:
    """Both encoders' tokenizers: T5 pads with `<pad>`, CLIP with its end mark, as FLUX has it.

    Raises:
        FormatError: a vocabulary lacks the marks that FLUX needs.
    """

    t5: Tokenizer
    clip: Tokenizer

    def __post_init__(self) -> None:
        for tokenizer, marks in (
            (self.t5, ("<pad>", "</s>")),
            (self.clip, ("<|startoftext|>", "<|endoftext|>")),
        ):
            lacking = [mark for mark in marks if tokenizer.token_to_id(mark) is None]
            if lacking:
                raise FormatError(f"a tokenizer's vocabulary lacks {', '.join(lacking)}")

    def encode_t5(self, prompts: Sequence[str], max_length: int) -> tuple[Tensor, list[str]]:
        """Token numbers (B, max_length) int64, and for each prompt the words that did not fit."""
        pad, end = self.t5.token_to_id("<pad>"), self.t5.token_to_id("</s>")
        rows, dropped = [], []
        for prompt in prompts:
            ids, rest = _encode(self.t5, prompt, max_length - 1)
            rows.append([*ids, end, *[pad] * (max_length - 1 - len(ids))])
            dropped.append(rest)
        return torch.tensor(rows), dropped

    def encode_clip(self, prompts: Sequence[str]) -> Tensor:
        """Token numbers (B, 77) int64; what does not fit is cut off, and T5 still reads it."""
        start, end = (self.clip.token_to_id(m) for m in ("<|startoftext|>", "<|endoftext|>"))
        rows = []
        for prompt in prompts:
            ids, _ = _encode(self.clip, prompt, CLIP_LENGTH - 2)
            rows.append([start, *ids, *[end] * (CLIP_LENGTH - 1 - len(ids))])
        return torch.tensor(rows)

    def dropped_by_clip(self, prompt: str) -> str:
        """The end of the prompt that CLIP does not read; empty where it reads all of it."""
        return _encode(self.clip, prompt, CLIP_LENGTH - 2)[1]


def _encode(tokenizer: Tokenizer, prompt: str, limit: int) -> tuple[list[int], str]:
    try:
        encoding = tokenizer.encode(prompt, add_special_tokens=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"the prompt cannot be tokenized: {error}") from error
    if len(encoding.ids) <= limit:
        return encoding.ids, ""
    # A word that was cut in two is told whole.
    first = encoding.offsets[limit][0]
    return encoding.ids[:limit], prompt[prompt.rfind(" ", 0, first + 1) + 1 :].strip()


def load_tokenizers(checkpoint: Checkpoint) -> Tokenizers:
    """The checkpoint's own tokenizers, or those packaged under the name in its facts.

    Raises:
        ModelNotFoundError: neither exists.
        FormatError: a tokenizer file is damaged.
    """
    found: dict[EncoderKind, Tokenizer] = {}
    kinds: tuple[EncoderKind, ...] = ("t5", "clip")
    for kind in kinds:
        folder = checkpoint.tokenizer_folders.get(kind)
        if folder is None:
            found[kind] = packaged_tokenizer(checkpoint.facts.tokenizer, kind)
        else:
            found[kind] = tokenizer_from_folder(folder, kind)
    return Tokenizers(t5=found["t5"], clip=found["clip"])


def packaged_tokenizer(name: str, kind: EncoderKind) -> Tokenizer:
    """The tokenizer `name` (`flux1`, `demo`) that ships inside the package.

    Raises:
        ModelNotFoundError: the package holds none of that name.
        FormatError: that can be no name.
    """
    return _parse(packaged_text(name, kind).decode(), f"packaged tokenizer `{name}/{kind}`")


def packaged_text(name: str, kind: EncoderKind) -> bytes:
    """Its `tokenizer.json`.

    Raises:
        ModelNotFoundError, FormatError: as `packaged_tokenizer`.
    """
    if not re.fullmatch(r"[a-z0-9_-]{1,64}", name):
        # The name may come from a stranger's file: it must not wander through folders.
        raise FormatError(f"`{name!r:.80}` is not a tokenizer's name")
    file = resources.files("flux_nf4") / "assets" / "tokenizers" / name / f"{kind}.json.gz"
    try:
        return gzip.decompress(file.read_bytes())
    except OSError as error:
        raise ModelNotFoundError(
            f"this package holds no {kind} tokenizer named `{name}`"
        ) from error


def tokenizer_from_folder(folder: Path, kind: EncoderKind) -> Tokenizer:
    """Read a Diffusers tokenizer folder: `tokenizer.json`, or the older files of its kind.

    Raises:
        ModelNotFoundError: the folder holds no tokenizer of this kind.
        FormatError: one of its files is damaged.
    """
    if (folder / "tokenizer.json").is_file():
        return _parse(_read(folder / "tokenizer.json"), str(folder / "tokenizer.json"))
    if kind == "clip" and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return clip_tokenizer(_read(folder / "vocab.json"), _read(folder / "merges.txt"))
    if kind == "t5" and (folder / "spiece.model").is_file():
        raise FormatError(
            f"`{folder}` holds T5's tokenizer as spiece.model alone",
            hint="put the model's tokenizer.json beside it; every published FLUX.1 has one",
        )
    wanted = "neither tokenizer.json nor vocab.json and merges.txt"
    wanted = wanted if kind == "clip" else "no tokenizer.json"
    raise ModelNotFoundError(f"`{folder}` holds no {kind} tokenizer: {wanted}")


def clip_tokenizer(vocab_json: str, merges_text: str) -> Tokenizer:
    """Build CLIP's tokenizer from its two classic files.

    Equal to transformers' `CLIPTokenizer`: NFC, single spaces, lower case, words by a pattern,
    then byte-level pair merges with `</w>` at the end of a word.

    Raises:
        FormatError: the files are not a vocabulary and its merges.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    try:
        vocab = json.loads(vocab_json)
        lines = [
            line for line in merges_text.splitlines() if line and not line.startswith("#version")
        ]
        left_and_right = [(left, right) for left, right in (line.split(" ") for line in lines)]
        model = models.BPE(
            vocab,
            left_and_right,
            unk_token="<|endoftext|>",
            end_of_word_suffix="</w>",
            continuing_subword_prefix="",
        )
    except Exception as error:  # `tokenizers` raises no narrower class
        raise FormatError(f"a CLIP vocabulary cannot be read: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    marks = r"<\|startoftext\|>|<\|endoftext\|>|"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(marks + CLIP_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(mark, normalized=False, special=True)
            for mark in ("<|startoftext|>", "<|endoftext|>")
        ]
    )
    return tokenizer


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise FormatError(f"`{path}` is larger than {MAX_TOKENIZER_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"`{path}` is not UTF-8: {error}") from error
    except OSError as error:
        raise ModelNotFoundError(f"`{path}` cannot be read: {error.strerror}") from error


def _parse(text: str, source: str) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises no narrower class
        raise FormatError(f"`{source}` is not a tokenizer: {error}") from error
    # What the file says about truncation and padding would hide what is cut off.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
