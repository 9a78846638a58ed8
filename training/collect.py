"""Pack what a run made into numbered pieces small enough to carry, and unpack them elsewhere.

    python -m training.collect pack OUT         weights, journals, logs, pictures
    python -m training.collect unpack OUT       back into the state folder

The pieces are OUT/demo.tar.gz.0, .1 and so on. Unpacked, everything can be packaged, or the
training continued (momentum is lost: the large state files do not travel).
"""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

from training import WORK
from training.checkpoint import Journal

PIECE_BYTES = 15 * 2**20
PREFIX = "demo.tar.gz."
SMALL_FILES = ("journal.json", "autoencoder.json", "transformer.log", "autoencoder.log")


def files_of(state: Path) -> list[Path]:
    """What is worth carrying: of the transformers only what the stages to come need, or ship."""
    stage = Journal.open(state / "journal.json", "flow").progress.stage
    names = ["autoencoder", "t5", "clip", "distil", "aware"]
    if stage in ("flow", "rule", "distil", "aware"):
        names.append("flow")
    files = [state / name for name in SMALL_FILES]
    files += [state / "weights" / f"{name}.safetensors" for name in names]
    files += sorted((state / "pictures").glob("*"))
    return [path for path in files if path.exists()]


def pack(state: Path, out: Path) -> list[Path]:
    """Write the pieces; returns their paths."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for path in files_of(state):
            archive.add(path, arcname=str(path.relative_to(state)))
    packed = buffer.getvalue()
    out.mkdir(parents=True, exist_ok=True)
    pieces = []
    for index, start in enumerate(range(0, len(packed), PIECE_BYTES)):
        pieces.append(out / f"{PREFIX}{index}")
        pieces[-1].write_bytes(packed[start : start + PIECE_BYTES])
    return pieces


def unpack(out: Path, state: Path) -> None:
    """Join the pieces and extract them."""
    pieces = sorted(out.glob(f"{PREFIX}*"), key=lambda path: int(path.suffix[1:]))
    joined = io.BytesIO(b"".join(path.read_bytes() for path in pieces))
    state.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=joined, mode="r:gz") as archive:
        archive.extractall(state, filter="data")


def main() -> None:
    """Read the command line and do it."""
    parser = argparse.ArgumentParser(description="carry the results of a training run")
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, default=WORK)
    options = parser.parse_args()
    state = options.work / "state"
    if options.action == "unpack":
        unpack(options.out, state)
        return
    for path in pack(state, options.out):
        print(f"{path} {path.stat().st_size}")


if __name__ == "__main__":
    main()
