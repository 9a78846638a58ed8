"""A work folder as the data step leaves it, with three things instead of 524."""

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

NUM_SCENES = 16


def sprite(index: int) -> bytes:
    image = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    colour = [(200, 30, 40, 255), (30, 160, 60, 255), (40, 60, 210, 255)][index]
    [draw.ellipse, draw.rectangle, draw.pieslice][index](
        (20, 20, 236, 236), fill=colour, **({"start": 0, "end": 200} if index == 2 else {})
    )
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def write_work(folder: Path) -> Path:
    folder.mkdir()
    sprites = [sprite(index) for index in range(3)]
    offsets = np.cumsum([0, *(len(data) for data in sprites)])
    webp = np.frombuffer(b"".join(sprites), np.uint8)
    np.savez(folder / "sprites.npz", webp=webp, offsets=offsets)

    generator = np.random.default_rng(0)
    objs = np.full((NUM_SCENES, 4, 5), -1, np.int16)
    objs[:, 0] = [[index % 3, 128, 128, 128, -1] for index in range(NUM_SCENES)]
    tokens = generator.integers(3, 40, (NUM_SCENES, 32), dtype=np.int16)
    tokens[:, 20:] = 1
    scenes = {
        "objs": objs,
        "bg": generator.integers(0, 256, (NUM_SCENES, 3), dtype=np.uint8),
        "t5": tokens,
        "clip": tokens,
        "u5": np.ones((1, 32), np.int16),
        "uc": np.ones((1, 32), np.int16),
    }
    np.savez(folder / "scenes.npz", **scenes)

    spec = {"kind": "one", "background": "white", "objects": [[1, -1]], "caption": "a box"}
    specs = {
        "test": [spec | {"set": "thing"}] * 2,
        "val": [spec | {"set": "thing"}] * 2,
        "unknown": [spec | {"set": "unknown"}] * 2,
    }
    sheets = {"grid": ["a box"] * 28, "free": ["a box"] * 4}
    prompts = json.dumps(specs | sheets).encode()
    (folder / "prompts.json.gz").write_bytes(gzip.compress(prompts))
    ids = {
        f"{name}_{kind}": np.resize(tokens, (len(entries), 32))
        for name, entries in (specs | sheets).items()
        for kind in ("t5", "clip")
    }
    np.savez(folder / "prompts.npz", **ids)
    return folder


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_work(tmp_path_factory.mktemp("recipe") / "work")
