"""Models with random weights, at any size: to measure speed and memory without a download.

Nothing is made before it is read, and then from one pool of random bytes, at a place that the
entry's name decides: loading costs what copying from memory costs, and the whole is never there
at once. Values are as large as in trained networks, so that activations stay finite. Images show
nothing.
"""

from __future__ import annotations

import math
import zlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from flux_nf4.formats.allinone import write_all_in_one
from flux_nf4.formats.checkpoint import Checkpoint, open_checkpoint
from flux_nf4.formats.component import Component, ComponentKind, Entries, Entry
from flux_nf4.formats.facts import FLUX_1_DEV, FLUX_1_SCHNELL, Facts
from flux_nf4.formats.keymap import CLIP_PROJECTION
from flux_nf4.memory.checkpoint_inventory import flux_1_dev_shapes
from flux_nf4.model.sizes import entry_shape
from flux_nf4.nf4.codec import NESTED_BLOCK_SIZE, NestedAbsmax, NF4Weight
from flux_nf4.nf4.reference import nest_absmax
from flux_nf4.pipeline.load import demo_path

if TYPE_CHECKING:
    from collections.abc import Mapping

RandomName: TypeAlias = Literal["flux1-dev", "flux1-schnell", "tiny"]
NF4Form: TypeAlias = Literal["nf4 v2", "nf4 v1"]

_BLOCK_SIZE = 64
_NUM_OFFSETS = 1 << 20  # places in the pool where an entry may begin
# Root mean square of the sixteen levels, each as likely as the others.
_LEVEL_RMS = 0.53
_CLIP_PROJECTION_SHAPE = (768, 768)  # that no image needs, and the published file has
_PLAIN_DTYPES: dict[ComponentKind, torch.dtype] = {
    "transformer": torch.bfloat16,
    "t5": torch.float8_e4m3fn,
    "clip": torch.float16,
    "vae": torch.bfloat16,
}


class RandomEntries(Entries):
    """The entries of one part: shape and form are known, values are made when they are read."""

    def __init__(self, outlines: Mapping[str, Entry], seed: int) -> None:
        super().__init__({name: (outline,) for name, outline in outlines.items()})
        self._seed = seed

    def __getitem__(self, name: str) -> Entry:
        (outline,) = self.parts(name)
        if isinstance(outline, NF4Weight):
            return self._weight(name, outline)
        shape, dtype = outline.shape, outline.dtype
        if len(shape) == 1 and not name.endswith("bias"):
            return torch.ones(shape, dtype=dtype)  # the scale of a norm
        random = self._bytes(name, math.prod(shape)).view(shape)
        if dtype == torch.float8_e4m3fn:
            # Sign and the lowest four bits: multiples of 2**-9 up to 0.03, in T5's own range.
            return (random & 0x8F).view(dtype)
        # Uniform in -1 to 1, then as wide as keeps the variance of what is multiplied.
        width = 0.02 if len(shape) == 1 else math.sqrt(3 / math.prod(shape[1:]))
        return (random.view(torch.int8).float() * (width / 128)).to(dtype)

    def _weight(self, name: str, outline: NF4Weight) -> NF4Weight:
        num_values, num_in = math.prod(outline.shape), outline.shape[1]
        random_G = self._bytes(f"{name}.absmax", num_values // _BLOCK_SIZE).float()
        absmax_G = (0.75 + random_G / 512) / (_LEVEL_RMS * math.sqrt(num_in))
        return NF4Weight(
            codes=self._bytes(name, num_values // 2),
            absmax=nest_absmax(absmax_G) if outline.is_nested else absmax_G,
            shape=outline.shape,
        )

    def _bytes(self, name: str, count: int) -> Tensor:
        start = zlib.crc32(name.encode()) % _NUM_OFFSETS
        return self._pool[start : start + count].clone()

    @cached_property
    def _pool(self) -> Tensor:
        sizes = [
            outline.codes.numel() if isinstance(outline, NF4Weight) else outline.numel()
            for (outline,) in map(self.parts, self)
        ]
        random = np.random.default_rng(self._seed).bytes(max(sizes) + _NUM_OFFSETS)
        return torch.frombuffer(bytearray(random), dtype=torch.uint8)


def random_checkpoint(name: RandomName, *, form: NF4Form = "nf4 v2", seed: int = 0) -> Checkpoint:
    """A model as if it lay in an all-in-one file; the same name, form and seed: the same bytes.

    `tiny` has the sizes of the built-in demo model.

    Raises:
        ModelNotFoundError: `tiny`, and this installation has no demo model.
    """
    shapes, facts = _sizes(name)
    path = Path(f"random-{name}-{form.replace(' ', '-')}")
    components = {
        kind: Component(
            kind=kind,
            entries=RandomEntries(_outlines(kind, shapes[kind], form), seed + number),
            source=path,
        )
        for number, kind in enumerate(shapes)
    }
    return Checkpoint(path=path, layout="all-in-one", components=components, facts=facts)


def write_random_model(path: str | Path, name: RandomName) -> None:
    """Write one as an all-in-one v2 file; `flux1-dev` has the length of the published file.

    Raises:
        DiskError: it could not be written; nothing is left behind.
    """
    checkpoint = random_checkpoint(name)
    components = {kind: part.entries for kind, part in checkpoint.components.items()}
    # The published file carries no facts; those of other sizes cannot be guessed.
    facts = None if name == "flux1-dev" else checkpoint.facts
    write_all_in_one(path, components, facts, vae_dtype=torch.float32, logit_scales=True)


def _sizes(
    name: RandomName,
) -> tuple[Mapping[ComponentKind, Mapping[str, tuple[int, ...]]], Facts]:
    if name == "tiny":
        demo = open_checkpoint(demo_path())
        shapes = {
            kind: {entry: entry_shape(part, entry) for entry in part.entries}
            for kind, part in demo.components.items()
        }
        return shapes, demo.facts
    shapes = {kind: dict(each) for kind, each in flux_1_dev_shapes().items()}
    shapes["clip"][CLIP_PROJECTION] = _CLIP_PROJECTION_SHAPE
    if name == "flux1-dev":
        return shapes, FLUX_1_DEV
    transformer = shapes["transformer"]
    for entry in [each for each in transformer if each.startswith("guidance_in.")]:
        del transformer[entry]
    return shapes, FLUX_1_SCHNELL


def _outlines(
    kind: ComponentKind, shapes: Mapping[str, tuple[int, ...]], form: NF4Form
) -> dict[str, Entry]:
    return {name: _outline(kind, name, shape, form) for name, shape in shapes.items()}


def _outline(kind: ComponentKind, name: str, shape: tuple[int, ...], form: NF4Form) -> Entry:
    if kind != "transformer" or len(shape) != 2:
        dtype = torch.float32 if name.endswith(".scale") else _PLAIN_DTYPES[kind]
        return torch.empty(shape, dtype=dtype, device="meta")
    num_blocks = shape[0] * shape[1] // _BLOCK_SIZE
    absmax: Tensor | NestedAbsmax = torch.empty(num_blocks, device="meta")
    if form == "nf4 v1":
        absmax = NestedAbsmax(
            codes=torch.empty(num_blocks, dtype=torch.uint8, device="meta"),
            absmax=torch.empty(-(-num_blocks // NESTED_BLOCK_SIZE), device="meta"),
            levels=torch.empty(256, device="meta"),
            offset=0.0,
        )
    codes = torch.empty(shape[0] * shape[1] // 2, dtype=torch.uint8, device="meta")
    return NF4Weight(codes=codes, absmax=absmax, shape=(shape[0], shape[1]))
