"""The training set as numbers: scenes and their captions as token ids; pictures are composed later.

    python -m training.dataset --scenes 600000 --out training/work/scenes.npz

Arrays of the file, for N scenes:
    objs  int16 [N, 4, 5]   concept (-1: none), centre x, centre y, size, tint (-1: none)
    bg    uint8 [N, 3]      background colour
    t5    int16 [N, 32]     caption, padded with 0
    clip  int16 [N, 32]     caption, padded with 1
    u5    int16 [1, 32]     the empty caption
    uc    int16 [1, 32]

The same seed gives the same file, whatever the number of processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from functools import cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from training import WORK
from training.captions import caption
from training.demo_tokenizers import load_tokenizer
from training.grammar import Scene, draw_scene, load_things

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from tokenizers import Tokenizer

NUM_TOKENS = 32
SCENES_PER_PART = 10_000
MAX_SPRITES = 4
Arrays = dict[str, "NDArray[np.generic]"]


@cache
def tokenizers() -> tuple[Tokenizer, Tokenizer]:
    """T5's and CLIP's, padding to 32 tokens."""
    t5, clip = load_tokenizer("t5"), load_tokenizer("clip")
    t5.enable_padding(length=NUM_TOKENS, pad_id=0, pad_token="<pad>")
    clip.enable_padding(length=NUM_TOKENS, pad_id=1, pad_token="<|endoftext|>")
    return t5, clip


def encode(captions: Sequence[str]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Captions -> T5 ids and CLIP ids, each int16 [n, 32]; longer ones are cut, their end kept."""
    arrays = []
    for tokenizer in tokenizers():
        rows = [encoding.ids for encoding in tokenizer.encode_batch(list(captions))]
        rows = [r if len(r) == NUM_TOKENS else [*r[: NUM_TOKENS - 1], r[-1]] for r in rows]
        arrays.append(np.array(rows, np.int16))
    return arrays[0], arrays[1]


def fits(text: str) -> bool:
    """Whether both tokenizers need no more than the 32 tokens of training."""
    return all(len(tokenizer.encode(text).ids) == NUM_TOKENS for tokenizer in tokenizers())


def objects_of(scenes: Sequence[Scene]) -> NDArray[np.int16]:
    """The sprites of scenes as the composer takes them: int16 [n, 4, 5]."""
    objects = np.full((len(scenes), MAX_SPRITES, 5), -1, np.int16)
    for row, scene in zip(objects, scenes, strict=True):
        row[: len(scene.sprites)] = scene.sprites
    return objects


def draw_part(seed: int, num_scenes: int) -> Arrays:
    """One part of the training set, from its own seed."""
    random, things = Random(seed), load_things()
    scenes, captions = [], []
    for _ in range(num_scenes):
        scene = draw_scene(things, random)
        text = caption(scene, things, random)
        # The background comes last: a caption that does not fit is said without embellishment.
        while len(text) > NUM_TOKENS and not fits(text):
            text = caption(scene, things, random, known=scene.kind != "nothing")
        scenes.append(scene)
        captions.append(text)
    t5, clip = encode(captions)
    shades = np.array([scene.shade for scene in scenes], np.uint8)
    return {"objs": objects_of(scenes), "bg": shades, "t5": t5, "clip": clip}


def load_scenes(path: Path) -> Arrays:
    """Read what this module wrote.

    Raises:
        ValueError: the file is of an older form.
    """
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    shape = arrays["objs"].shape
    if shape[1:] != (MAX_SPRITES, 5):
        raise ValueError(f"`objs` of {path} is {list(shape)}: run `python -m training.dataset`")
    return arrays


def main() -> None:
    """Draw the training set in parallel and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=600_000)
    parser.add_argument("--out", type=Path, default=WORK / "scenes.npz")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.monotonic()
    jobs = [
        (arguments.seed * 1_000_003 + first, min(SCENES_PER_PART, arguments.scenes - first))
        for first in range(0, arguments.scenes, SCENES_PER_PART)
    ]
    with multiprocessing.get_context("spawn").Pool() as pool:
        parts = pool.starmap(draw_part, jobs)
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    arrays["u5"], arrays["uc"] = encode([""])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arguments.out, **arrays)
    size = arguments.out.stat().st_size / 1e6
    print(f"{arguments.scenes} scenes, {size:.1f} MB, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
