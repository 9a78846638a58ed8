"""Everything about a step in one go: `python -m benchmarks.step --out DIR`.

Sections run one after another, each in a process of its own with a limit on its time: what fails
or hangs loses nothing but itself. Results are lines of JSON in `DIR/step.jsonl`, written as they
come; `benchmarks.waterfall` draws them. On one H200, all of it is made to end within ten minutes:

    python -m benchmarks.step --out "$OUT" --limit 560

`--sizes tiny --device cpu` is a rehearsal, in a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.step_sections import SECTIONS, run_section
from benchmarks.stepper import Setting
from flux_nf4.cli.bench_record import append_record

FILE = "step.jsonl"
_STDERR_LINES = 4


def main() -> None:
    """Run all sections, or with `--section` one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--limit", type=float, default=560, help="seconds for everything")
    parser.add_argument("--sizes", default="flux1-dev", choices=("flux1-dev", "tiny"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="sections, separated by commas")
    parser.add_argument("--shared", type=Path, help="folder between sections")
    parser.add_argument("--section", help="run this one here")
    parser.add_argument("--commit", help="where the working tree has no history to tell it")
    given = parser.parse_args()
    if given.section:
        setting = Setting(sizes=given.sizes, device=given.device, shared=given.shared)
        commit = {"commit": given.commit} if given.commit else {}
        for record in run_section(given.section, setting):
            append_record(given.out / FILE, {**record, **commit})
        return
    given.out.mkdir(parents=True, exist_ok=True)
    until_s = time.monotonic() + given.limit
    chosen = given.only.split(",") if given.only else list(SECTIONS)
    with tempfile.TemporaryDirectory() as shared:
        for name in chosen:
            options = ["--out", given.out, "--sizes", given.sizes, "--device", given.device]
            options += ["--commit", given.commit] if given.commit else []
            began_s = time.monotonic()
            limit_s = min(SECTIONS[name].limit_s, until_s - began_s)
            error = _run([*options, "--section", name, "--shared", shared], Path(shared), limit_s)
            seconds = round(time.monotonic() - began_s, 1)
            append_record(
                given.out / FILE,
                {"kind": "section", "name": name, "seconds": seconds, "error": error},
            )
            print(f"{name}: {seconds} s{f', {error}' if error else ''}", flush=True)


def _run(options: list[object], shared: Path, limit_s: float) -> str | None:
    """What went wrong with a section in a process of its own; None: nothing."""
    if limit_s <= 0:
        return "no time was left"
    command = [sys.executable, "-m", "benchmarks.step", *map(str, options)]
    # A file, as compilers in children may hold a pipe open for longer than the section takes.
    log = shared / "stderr.txt"
    with log.open("w") as said:
        process = subprocess.Popen(command, stderr=said, start_new_session=True)
        try:
            process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(lines[-_STDERR_LINES:]) if process.returncode else None


if __name__ == "__main__":
    main()
