"""What is fuzzed: every parser of bytes that strangers write, its seeds, its language's words.

A target takes any bytes at all and returns; FormatError and InputError are the right answers to
bytes that are wrong, and everything else that is raised is a fault of the parser.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from fuzz_mutator import mutated_json

from flux_nf4.errors import FormatError, InputError
from flux_nf4.formats.bnb import state_bytes, tensors_from_weight, weight_from_tensors
from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.formats.facts import METADATA_KEY, Facts
from flux_nf4.formats.header import LENGTH_BYTES, encode_header, parse_header, plan_header
from flux_nf4.formats.keymap import STATE_PREFIX
from flux_nf4.formats.schema import expected_shapes
from flux_nf4.formats.survey import survey
from flux_nf4.formats.tensorfile import TensorSource, write_sources
from flux_nf4.nf4 import reference
from flux_nf4.pipeline.image_metadata import ImageSettings, exif_and_xmp, png_texts, read_image
from flux_nf4.pipeline.png import save_png

ALLOWED = (FormatError, InputError)
JSON_WORDS = (
    "null",
    "true",
    "NaN",
    "1e999",
    "-1",
    "0.5",
    "\\ud800",
    "[[[[[[[[",
    "18446744073709551616",
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A parser that takes bytes, valid bytes to begin with, and words to build others from."""

    parse: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    words: tuple[str, ...]
    json_start: int | None = None  # where its JSON begins, if it has one

    def mutated(self, data: bytes, seed: int) -> bytes | None:
        """Something near valid bytes, by way of their JSON; None where there is none."""
        if self.json_start is None:
            return None
        if self.json_start < LENGTH_BYTES:
            text = mutated_json(data[self.json_start :], self.words, seed)
            return None if text is None else data[: self.json_start] + text
        end = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
        text = mutated_json(data[LENGTH_BYTES:end], self.words, seed)
        if text is None:
            return None
        return len(text).to_bytes(LENGTH_BYTES, "little") + text + data[end:]

    def run(self, data: bytes) -> None:
        """Parse; an exception that leaves this is a fault."""
        try:
            self.parse(data)
        except ALLOWED:
            return


# ---- the header of a safetensors file -----------------------------------------------------------


def header_seeds() -> list[bytes]:
    specs = [
        [],
        [("a", torch.float32, (2, 3)), ("b.weight", torch.uint8, (96, 1))],
        [("x", torch.bfloat16, ()), ("y", torch.float8_e4m3fn, (0, 4)), ("z", torch.int64, (1,))],
    ]
    headers = [encode_header(plan_header(each, {"format": "pt"})) for each in specs]
    return [header[8:] for header in headers]


# ---- the JSON beside a quantised weight ---------------------------------------------------------


@cache
def small_weight(*, nested: bool) -> dict[str, torch.Tensor]:
    w_NK = torch.linspace(-1, 1, 512).view(4, 128)
    return tensors_from_weight("w", reference.quantize(w_NK, nested=nested))


def parse_quant_state(data: bytes) -> object:
    """The first byte chooses the other tensors: nested or not; the rest is the JSON."""
    companions = {
        key.removeprefix("w."): each for key, each in small_weight(nested=data[:1] == b"n").items()
    }
    codes = companions.pop("w")
    text = bytearray(data[1:] or b" ")
    companions[f"{STATE_PREFIX}nf4"] = torch.frombuffer(text, dtype=torch.uint8)
    return weight_from_tensors("w", codes, companions)


def quant_state_seeds() -> list[bytes]:
    w_NK = torch.linspace(-1, 1, 512).view(4, 128)
    return [
        letter + state_bytes(reference.quantize(w_NK, nested=nested))
        for letter, nested in ((b"-", False), (b"n", True))
    ]


# ---- the facts of a model -----------------------------------------------------------------------


def parse_facts(data: bytes) -> object:
    return Facts.from_metadata({METADATA_KEY: data.decode("utf-8", errors="replace")})


# ---- a whole file -------------------------------------------------------------------------------


def parse_file(data: bytes) -> object:
    """As `info` and `verify` would begin."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(data)
        file.flush()
        found = survey(file.name)
        open_checkpoint(file.name)
        return found


SIZES = {
    "img_in.weight": (64, 64),
    "txt_in.weight": (64, 64),
    "vector_in.in_layer.weight": (64, 64),
    "single_blocks.0.norm.query_norm.scale": (64,),
    "single_blocks.0.linear2.weight": (64, 128),
    "final_layer.linear.weight": (64, 64),
}


def small_transformer(prefix: str, *, nested: bool) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, shape in expected_shapes("transformer", SIZES).items():
        values = torch.linspace(-1, 1, math.prod(shape)).view(shape).bfloat16()
        if values.dim() == 2:
            weight = reference.quantize(values, nested=nested)
            tensors |= tensors_from_weight(prefix + name, weight)
        else:
            tensors[prefix + name] = values
    return tensors


def file_seeds() -> list[bytes]:
    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        for prefix, nested in (("", True), ("model.diffusion_model.", False)):
            tensors = small_transformer(prefix, nested=nested)
            sources = {name: TensorSource.of(tensor) for name, tensor in tensors.items()}
            write_sources(path, sources, metadata=Facts().to_metadata())
            seeds.append(path.read_bytes())
    return seeds


# ---- the settings in an image -------------------------------------------------------------------


def image_seeds() -> list[bytes]:
    from PIL import Image

    settings = ImageSettings(
        prompt="an owl, “wise”",
        model="demo",
        seed=7,
        width=64,
        height=64,
        num_inference_steps=4,
        distilled_guidance_scale=3.5,
        guidance_scale=1.0,
        max_sequence_length=32,
        quantization="nf4 v2",
        dtype="bfloat16",
    )
    image = Image.new("RGB", (2, 2))
    seeds = []
    png = io.BytesIO()
    save_png(png, image, png_texts(settings))
    seeds.append(png.getvalue())
    record = read_image(png.getvalue())
    for kind in ("JPEG", "WEBP"):
        exif, xmp = exif_and_xmp(record, is_jpeg=kind == "JPEG")
        file = io.BytesIO()
        image.save(file, format=kind, exif=exif, xmp=xmp)
        seeds.append(file.getvalue())
    return seeds


TARGETS = {
    "header": Target(
        parse=parse_header,
        json_start=0,
        seeds=header_seeds,
        words=(
            "dtype",
            "shape",
            "data_offsets",
            "__metadata__",
            "F32",
            "U8",
            "F8_E4M3",
            *JSON_WORDS,
        ),
    ),
    "quant_state": Target(
        parse=parse_quant_state,
        json_start=1,
        seeds=quant_state_seeds,
        words=("quant_type", "blocksize", "nested_offset", "nf4", "fp4", "bfloat16", *JSON_WORDS),
    ),
    "facts": Target(
        parse=parse_facts,
        json_start=0,
        seeds=lambda: [json.dumps({}).encode(), Facts().to_metadata()[METADATA_KEY].encode()],
        words=("name", "shift", "tokenizer", "licence", *JSON_WORDS),
    ),
    "file": Target(
        parse=parse_file,
        json_start=LENGTH_BYTES,
        seeds=file_seeds,
        words=(
            "model.diffusion_model.",
            "double_blocks.0.",
            "vae.",
            ".weight",
            "absmax",
            *JSON_WORDS,
        ),
    ),
    "image": Target(
        parse=read_image,
        seeds=image_seeds,
        words=("tEXt", "zTXt", "iTXt", "IHDR", "parameters", "Steps: ", "Exif", "XMP ", "VP8X"),
    ),
}
