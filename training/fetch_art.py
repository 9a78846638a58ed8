"""Fetch the art once and write what the rest of the recipe needs: `sprites.npz`, `concepts.json`.

    python -m training.fetch_art          needs npm and a network; both outputs are committed

The art is Microsoft's Fluent Emoji 3D (MIT), as packed by `@lobehub/fluent-emoji-3d`: one
256 x 256 WebP with transparency for each emoji, named by its code points. `concepts.txt` chooses
524 of them and gives each its names. The files are kept as they are, one behind the other.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from training import DATA
from training.grammar import COLOUR_WORDS, Thing

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
CONCEPTS = Path(__file__).with_name("concepts.txt")


def plural_of(name: str) -> str:
    """The regular English plural of a name, of its last word."""
    if name.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    if name.split()[-1] in ("tomato", "potato", "mango", "volcano", "tornado"):
        return name + "es"
    if name.endswith(("wolf", "leaf", "loaf")):
        return name[:-1] + "ves"
    if name.endswith("ife"):
        return name[:-2] + "ves"
    return name + "s"


IRREGULAR = {
    "face with heart eyes": "faces with heart eyes",
    "face with a mask": "faces with a mask",
    "face with tears of joy": "faces with tears of joy",
    "face with sunglasses": "faces with sunglasses",
    "face in love": "faces in love",
    "pile of poo": "piles of poo",
    "bouquet of flowers": "bouquets of flowers",
    "stack of pancakes": "stacks of pancakes",
    "tooth": "teeth",
    "footprints": "footprints",
    "paw prints": "paw prints",
    "sheep": "sheep",
    "deer": "deer",
    "moose": "moose",
    "bison": "bison",
    "thumbs up": "thumbs up",
    "cactus": "cacti",
    "santa claus": "santas",
}
# Names that are words for a mass or a set although another name of the same thing is not.
UNCOUNTED = {
    *("bread", "meat", "coffee", "wine", "beer", "soda", "honey", "ramen", "spaghetti"),
    *("pancakes", "cheese", "fire", "corn", "pasta", "rice", "soup", "fries", "lightning"),
    *("eyeglasses", "planet earth", "poop", "footprints", "paw prints"),
}


def parse_concepts(text: str) -> tuple[list[str], list[Thing]]:
    """Read `concepts.txt`: the emoji's code points, and the things, in the file's order."""
    keys, things = [], []
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        key, rest = line.split(maxsplit=1)
        names_text, _, plural = (part.strip() for part in rest.partition(";"))
        names = tuple(name.strip() for name in names_text.split("|"))
        uncounted = tuple(name in UNCOUNTED or plural == names[0] == name for name in names)
        plurals = tuple(
            name if is_mass else IRREGULAR.get(name, plural_of(name))
            for name, is_mass in zip(names, uncounted, strict=True)
        )
        if plural:
            plurals = (plural, *plurals[1:])
        # "purple heart" is a thing; a purple tint on a heart would be called the same.
        tints = not any(word in COLOUR_WORDS for name in names for word in name.split())
        keys.append(key)
        things.append(Thing(names=names, plurals=plurals, uncounted=uncounted, tints=tints))
    return keys, things


def download(folder: Path) -> Path:
    """Unpack the npm package under `folder`; the folder of its WebP files."""
    command = ["npm", "pack", "--silent", PACKAGE]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    with tarfile.open(folder / done.stdout.split()[-1]) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package" / "assets"


def main() -> None:
    """Write `training/data/sprites.npz` and `training/data/concepts.json`."""
    keys, things = parse_concepts(CONCEPTS.read_text(encoding="utf-8"))
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        art = download(Path(temporary))
        files = [(art / f"{key}.webp").read_bytes() for key in keys]
    offsets = np.cumsum([0] + [len(file) for file in files]).astype(np.int64)
    np.savez(DATA / "sprites.npz", webp=np.frombuffer(b"".join(files), np.uint8), offsets=offsets)
    # One thing a line: readable, and a change shows as one line of a diff.
    text = "[\n" + ",\n".join(json.dumps(thing._asdict()) for thing in things) + "\n]\n"
    (DATA / "concepts.json").write_text(text, encoding="utf-8")
    print(f"{len(things)} things, {offsets[-1] / 1e6:.2f} MB of sprites")


if __name__ == "__main__":
    main()
