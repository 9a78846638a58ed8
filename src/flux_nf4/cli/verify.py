"""`flux-nf4 verify`: everything that is wrong with a checkpoint, and not only what is first."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flux_nf4.cli.byte_progress import ByteProgress
from flux_nf4.cli.console import print_data, print_json, printable, styled
from flux_nf4.cli.findings import counted, num_bytes_text
from flux_nf4.cli.options import argument, option
from flux_nf4.cli.paths import path_of
from flux_nf4.cli.verb import Verb, debug_option, json_option
from flux_nf4.errors import FormatError, InputError

if TYPE_CHECKING:
    from flux_nf4.formats.verification import Verification

_COLUMN = 13
_MOST_LINES = 100  # JSON has all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """The options of `verify`."""

    path: str | None = argument("PATH", help="a checkpoint: file or folder")
    sha256: bool = option(
        "--sha256",
        default=False,
        help="hash the file too, and compare it with what was\npublished, or with its manifest",
    )
    json: bool = json_option()
    debug: bool = debug_option()


def run(options: VerifyOptions) -> int:
    """Look, tell, and return 3 where something is wrong."""
    from flux_nf4.formats.manifest import check_manifest, manifest_path
    from flux_nf4.formats.verification import verify

    if options.path is None:
        raise InputError("no path is given", hint="name a checkpoint: `flux-nf4 verify PATH`")
    path = path_of(options.path)
    num_bytes = 0
    if options.sha256:
        with contextlib.suppress(OSError, ValueError):  # `verify` says what is wrong with the path
            num_bytes = path.stat().st_size
    with ByteProgress("reading", num_bytes, quiet=not num_bytes) as progress:
        # A folder has no hash of its own, but its manifest has one for each file.
        is_listed = path.is_dir() and manifest_path(path).is_file()
        with_sha256 = options.sha256 and not is_listed
        found = verify(path, with_sha256=with_sha256, on_bytes=progress.advance)
        has_manifest = check_manifest(found, with_sha256=options.sha256, on_bytes=progress.advance)
    if options.json:
        _print_json(found, has_manifest=has_manifest)
    else:
        _print_lines(found)
        if has_manifest and not found.faults:
            hashed = "every hash" if options.sha256 else "every length"
            print_data(f"{hashed} is that of its manifest")
    return FormatError.exit_code if found.faults else 0


def _print_json(found: Verification, *, has_manifest: bool) -> None:
    print_json(
        {
            "path": str(found.path),
            "ok": not found.faults,
            "bytes": found.num_bytes,
            "tensors": found.num_tensors,
            "parts": found.parts,
            "reference": found.reference or None,
            "sha256": found.sha256 or None,
            "manifest": has_manifest,
            "findings": [
                {"part": fault.part, "text": fault.text, "hint": fault.hint or None}
                for fault in found.faults
            ],
        },
        indent=2,
    )


def _print_lines(found: Verification) -> None:
    for fault in found.faults[:_MOST_LINES]:
        print_data(f"{styled(f'{fault.part:<{_COLUMN}}', 'red')}{printable(fault.text)}")
    if len(found.faults) > _MOST_LINES:
        print_data(f"and {len(found.faults) - _MOST_LINES:,} more; `--json` lists all of them")
    for hint in dict.fromkeys(fault.hint for fault in found.faults if fault.hint):
        print_data(f"{'':{_COLUMN}}-> {printable(hint)}")
    if found.sha256:
        print_data(f"sha256 {found.sha256}")
    if found.reference:
        same = "is" if found.sha256 and not found.faults else "has the length of"
        print_data(f"it {same} the published {found.reference}")
    num_faults = len(found.faults)
    verdict = counted(num_faults, "finding") if num_faults else "ok"
    parts = ", ".join(found.parts) or "nothing readable"
    print_data(
        f"{verdict}: {printable(str(found.path))}, {num_bytes_text(found.num_bytes)}, "
        f"{found.num_tensors:,} tensors ({parts})"
    )


VERB = Verb(
    name="verify",
    summary="Look through a checkpoint for whatever is wrong with it.",
    options=VerifyOptions,
    run=run,
    examples=("flux1-dev-bnb-nf4-v2.safetensors --sha256", "flux1-dev --json"),
    note="Exit code 0: nothing found. 3: damaged, incomplete, or not there.",
)
