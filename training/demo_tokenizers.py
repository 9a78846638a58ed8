"""Make the demo model's two tokenizers, small enough to ship: `assets/tokenizers/demo`.

    python -m training.demo_tokenizers          writes `assets/demo/words.json` too

The real vocabularies would make the text encoders' embeddings larger than the transformer. Both
lower their input and encode any text; neither pads nor truncates.

    t5.json.gz    unigram, 1,536 pieces; <pad> 0, </s> 1 (appended), <unk> 2
    clip.json.gz  byte-level BPE; <|startoftext|> 0 and <|endoftext|> 1 around the text

A word that the grammar knows is one whole piece of the T5 vocabulary, marked at both ends. No
other word can contain such a piece, so that "catalogue" does not look like a cat: it is spelt in
sub-words, which mean nothing.
"""

from __future__ import annotations

import gzip
import json
import math
from random import Random
from typing import TYPE_CHECKING

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from training import ASSETS
from training.captions import (
    FIXED_TAILS,
    PREFIXES,
    caption,
    known_words,
    unknown_words,
    vocabulary,
)
from training.grammar import draw_scene, load_things

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLDER = ASSETS / "tokenizers" / "demo"
NUM_T5_PIECES = 1536
NUM_CLIP_MERGED = 1860
NUM_CAPTIONS = 20_000
WORD_START, WORD_END = "▁", "·"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?-'\"()&/#+*%_"
# A word reaches over inner hyphens ("t-shirt"), not over apostrophes ("cat's").
AT_WORD_START = Regex(r"(?<!\w)(?<!\w-)(?=\w)")
AT_WORD_END = Regex(r"(?<=\w)(?!\w|-\w)")
# The first CLIP's pattern (github.com/openai/CLIP, simple_tokenizer.py).
CLIP_PATTERN = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


def _t5_normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(AT_WORD_END, WORD_END),
            normalizers.Replace(AT_WORD_START, WORD_START),
        ]
    )


def _sub_words(words: Sequence[str], num_pieces: int) -> list[tuple[str, float]]:
    """Pieces that spell English words well, none longer than six characters."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = _t5_normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.UnigramTrainer(
        vocab_size=num_pieces,
        special_tokens=["<unk>"],
        unk_token="<unk>",
        max_piece_length=6,
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    # The trainer's last digits differ from run to run.
    return [(piece, round(score, 3)) for piece, score in vocabulary if piece != "<unk>"]


def build_t5(known: Sequence[str], words: Sequence[str]) -> Tokenizer:
    """The unigram tokenizer: `known` words whole, sub-words that spell `words`, and characters."""
    whole = [f"{WORD_START}{word}{WORD_END}" for word in known]
    single = [*CHARACTERS, WORD_START, WORD_END]
    room = NUM_T5_PIECES - 3 - len(whole) - len(single)
    # A whole word always beats its spelling, and sub-words beat characters.
    scores = [(piece, -2.0) for piece in whole]
    taken = {*whole, *single}
    sub_words = [(p, s - 6.0) for p, s in _sub_words(words, 2 * room) if p not in taken]
    scores += sorted(sub_words, key=lambda entry: (-entry[1], entry[0]))[:room]
    scores += [(piece, -16.0) for piece in single]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -30.0)]
    tokenizer = Tokenizer(models.Unigram(special + scores, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = _t5_normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Fuse(), decoders.Replace(WORD_END, ""), decoders.Replace(WORD_START, " ")]
    )
    tokenizer.add_special_tokens([name for name, _ in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    assert tokenizer.get_vocab_size() == NUM_T5_PIECES
    return tokenizer


def build_clip(texts: Sequence[str]) -> Tokenizer:
    """The byte-level BPE tokenizer, trained on `texts`; every byte is in it in both its forms."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(
            end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token="<|endoftext|>"
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(CLIP_PATTERN, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_CLIP_MERGED,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    spec = json.loads(tokenizer.to_str())
    # The trainer numbers characters differently from run to run, and leaves some out.
    merged = ["".join(merge) for merge in spec["model"]["merges"]]
    last = [f"{character}</w>" for character in alphabet]
    pieces = ["<|startoftext|>", "<|endoftext|>", *alphabet, *last, *merged]
    spec["model"]["vocab"] = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("</w>", " "), decoders.ByteLevel()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)],
    )
    return tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """One of the two, `t5` or `clip`, from the package."""
    text = gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()).decode("utf-8")
    return Tokenizer.from_str(text)


def known_pieces() -> list[str]:
    """The words that get a whole piece: the grammar's, and those of the fixed tails."""
    phrases = [phrase.replace(",", " ").strip() for phrase in (*FIXED_TAILS, *PREFIXES)]
    extra = {word for phrase in phrases for word in phrase.split()}
    known = known_words(load_things()) | extra
    known |= {"background", *("lighting", "style", "color", "palette", "colors")}
    return sorted(known)


def main() -> None:
    """Write both tokenizers."""
    things, random = load_things(), Random(1)
    captions = [caption(draw_scene(things, random), things, random) for _ in range(NUM_CAPTIONS)]
    supply = unknown_words(held_out=False)
    known, unknown = known_pieces(), [*supply.adjectives, *supply.others]
    # Known words so often that nearly each becomes one token; the rest is spelt.
    clip_texts = captions[:6000] + known * 60 + unknown
    words_file = ASSETS / "demo" / "words.json"
    words_file.parent.mkdir(parents=True, exist_ok=True)
    words_file.write_text(json.dumps(vocabulary(things), indent=1) + "\n", encoding="utf-8")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, tokenizer in (("t5", build_t5(known, unknown)), ("clip", build_clip(clip_texts))):
        data = tokenizer.to_str().encode("utf-8")
        packed = gzip.compress(data, compresslevel=9, mtime=0)
        (FOLDER / f"{name}.json.gz").write_bytes(packed)
        lengths = sorted(len(encoding.ids) for encoding in tokenizer.encode_batch(captions))
        print(
            f"{name}: {tokenizer.get_vocab_size()} pieces, {len(packed) / 1e3:.0f} kB; captions "
            f"have {lengths[len(lengths) // 2]} tokens, 99.9 % at most "
            f"{lengths[math.floor(0.999 * len(lengths))]}, the longest {lengths[-1]}"
        )


if __name__ == "__main__":
    main()
