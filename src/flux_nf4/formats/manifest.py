"""The manifest beside a checkpoint: what every file and tensor must be, and where it comes from.

`<checkpoint>.manifest.json` is written by `quantize` and read by `verify`. It holds the length and
sha256 of each file, the sha256 of each tensor, the source, the options and the licence.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from flux_nf4.errors import FluxNF4Error, FormatError
from flux_nf4.formats.atomic import disk_error
from flux_nf4.formats.strictjson import parse_json
from flux_nf4.formats.tensorfile import TensorFile, tensor_bytes
from flux_nf4.formats.verification import file_sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flux_nf4.formats.resumable import FileHashes
    from flux_nf4.formats.verification import Verification

FORMAT = "flux-nf4 manifest 1"

_MAX_BYTES = 25_000_000  # that of a model of 2,384 tensors has 0.4
_AGAIN = "get it again, or quantise anew; if you changed it yourself, remove the manifest"


def manifest_path(path: Path) -> Path:
    """Where the manifest of a checkpoint, file or folder, is."""
    target = Path(os.path.realpath(path))  # beside the file itself where `path` is a link to it
    return target.with_name(f"{target.name}.manifest.json")


def write_manifest(path: Path, files: Mapping[str, FileHashes], about: Mapping[str, Any]) -> None:
    """Write the manifest of the checkpoint `path`; '' names a checkpoint that is one file.

    Raises:
        DiskError: it could not be written.
    """
    listed = {
        name or path.name: {
            "bytes": hashes.num_bytes,
            "sha256": hashes.sha256,
            "tensors": hashes.tensors,
        }
        for name, hashes in files.items()
    }
    values = {"format": FORMAT, **about, "files": listed}
    target = manifest_path(path)
    # Not `atomic_file`: a run that is killed would leave a file behind that no other run knows.
    temporary = target.with_name(f"{target.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write((json.dumps(values, indent=1) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise disk_error(target, error) from error


def check_manifest(
    found: Verification, *, with_sha256: bool, on_bytes: Callable[[int], None]
) -> bool:
    """Compare a checkpoint with the manifest beside it, and note every difference in `found`.

    Lengths always, hashes `with_sha256`; `on_bytes` hears of what was read. Whether there is one.
    """
    path = manifest_path(found.path)
    if not path.is_file():
        return False
    try:
        files = _read(path)
        if found.path.is_dir():
            places = {name: found.path / name for name in files}
        else:
            # A file that was renamed together with its manifest is still the same.
            places = dict.fromkeys([*files][:1], found.path)
        for name, place in places.items():
            _check_file(found, place, files[name], with_sha256=with_sha256, on_bytes=on_bytes)
    except FluxNF4Error as error:
        found.add("file", error.message, error.hint)
    except OSError as error:
        found.add("file", f"cannot read `{found.path}`: {error.strerror or error}")
    return True


def _read(path: Path) -> dict[str, dict[str, Any]]:
    with path.open("rb") as file:
        values = parse_json(file.read(_MAX_BYTES), f"`{path}`")
    files = values.get("files") if isinstance(values, dict) else None
    if not isinstance(files, dict) or values.get("format") != FORMAT:
        raise FormatError(f"`{path}` is not a manifest of flux-nf4", hint=_AGAIN)
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        is_good = (
            isinstance(entry, dict)
            and {"bytes", "sha256", "tensors"} <= entry.keys()
            and isinstance(entry["tensors"], dict)
        )
        # A name must not lead out of the folder.
        if not is_good or not parts or ".." in parts or "\\" in name or name.startswith("/"):
            raise FormatError(f"`{path}` has the impossible entry {name!r:.80}", hint=_AGAIN)
    return files


def _check_file(
    found: Verification,
    path: Path,
    entry: Mapping[str, Any],
    *,
    with_sha256: bool,
    on_bytes: Callable[[int], None],
) -> None:
    if not path.is_file():
        found.add("file", f"`{path}` is missing, and its manifest lists it", _AGAIN)
        return
    num_bytes = path.stat().st_size
    if num_bytes != entry["bytes"]:
        found.add(
            "file",
            f"`{path}` has {num_bytes:,} bytes, and {entry['bytes']} by its manifest",
            _AGAIN,
        )
    elif with_sha256 and (found.sha256 or file_sha256(path, on_bytes)) != entry["sha256"]:
        found.add("file", f"`{path}` does not have the sha256 of its manifest", _AGAIN)
        if entry["tensors"]:
            _name_tensors(found, path, entry["tensors"])


def _name_tensors(found: Verification, path: Path, hashes: Mapping[str, str]) -> None:
    file = TensorFile(path)
    for name in file.names:
        if hashlib.sha256(tensor_bytes(file.tensor(name))).hexdigest() != hashes.get(name):
            found.add("file", f"`{name}` does not have the sha256 of its manifest", _AGAIN)
        file.drop_pages()
