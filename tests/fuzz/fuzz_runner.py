# ruff: noqa: T201  a command that prints
"""Fuzzing with atheris, for a bounded time: what `scripts/fuzz` runs.

    scripts/fuzz                                 every target, 60 seconds in all
    scripts/fuzz --target header --seconds 600
    scripts/fuzz --target header --replay FILE   once more what was found

Inputs that reached something new are kept in `build/fuzz/TARGET`, and the next run begins with
them; an input that breaks a parser is named on the screen, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "fuzz"
MAX_BYTES = 1 << 17
MAX_INPUT_SECONDS = 10
MAX_MEGABYTES = 3000  # torch is in them
TARGETS = ("header", "quant_state", "facts", "file", "image")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz",
        description="Fuzz every parser of strangers' bytes, for a bounded time.",
    )
    parser.add_argument(
        "--seconds", type=int, default=60, help="time for all targets together (%(default)s)"
    )
    parser.add_argument(
        "--target", action="append", choices=TARGETS, help="this one only; may be repeated"
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run the target on FILE once")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    found.target = found.target or list(TARGETS)
    if found.seconds < len(found.target):
        parser.error(f"--seconds must be at least {len(found.target)}, one for each target")
    if found.replay is not None and len(found.target) != 1:
        parser.error("--replay needs one --target")
    return found


def fuzz_target(name: str, seconds: int) -> bool:
    """Fuzz one target in a process of its own; whether it held."""
    corpus = FOLDER / name
    corpus.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--child", name, "--seconds", str(seconds)]
    print(f"{name:<12}", end="", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    log = done.stdout + done.stderr
    (FOLDER / f"{name}.log").write_text(log, encoding="utf-8")
    found = re.search(r"stat::number_of_executed_units: (\d+)", log)
    if done.returncode == 0 and found is not None:
        print(f"{int(found[1]):>12,} inputs in {seconds} s, {len(list(corpus.iterdir()))} kept")
        return True
    print(f"FAILED (exit status {done.returncode})\n{log[-4000:]}")
    failures = re.findall(r"Test unit written to (\S+)", log)
    for failure in failures:
        print(f"repeat it with: scripts/fuzz --target {name} --replay {failure}")
    return False


def fuzz_here(name: str, seconds: int) -> NoReturn:
    """Become the fuzzer: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["flux_nf4", "PIL"]):
        import fuzz_targets
    target = fuzz_targets.TARGETS[name]
    corpus = FOLDER / name
    for index, seed in enumerate(target.seeds()):
        (corpus / f"seed-{index}").write_bytes(seed)
    words = FOLDER / f"{name}.words"
    quoted = (word.replace("\\", r"\\") for word in target.words)
    words.write_text("".join(f'"{word}"\n' for word in quoted), encoding="utf-8")
    options = {
        "max_total_time": seconds,
        "max_len": MAX_BYTES,
        "timeout": MAX_INPUT_SECONDS,
        "rss_limit_mb": MAX_MEGABYTES,
        "print_final_stats": 1,
        "dict": words,
        "artifact_prefix": f"{FOLDER}/{name}-",
    }

    def mutate(data: bytes, max_bytes: int, seed: int) -> bytes:
        changed = target.mutated(data, seed) if seed % 2 else None
        if changed is None or len(changed) > max_bytes:
            return atheris.Mutate(data, max_bytes)
        return changed

    command = [__file__, *(f"-{key}={value}" for key, value in options.items()), str(corpus)]
    atheris.Setup(command, target.run, custom_mutator=mutate)
    atheris.Fuzz()
    sys.exit(0)


def main(arguments: list[str]) -> int:
    """Fuzz, or repeat one input; 1 if anything was found."""
    chosen = parse_arguments(arguments)
    if chosen.replay is not None:
        import fuzz_targets

        fuzz_targets.TARGETS[chosen.target[0]].run(chosen.replay.read_bytes())
        print("nothing is raised")
        return 0
    if importlib.util.find_spec("atheris") is None:
        print(
            "error: fuzzing needs atheris, which is not installed\n"
            f"hint: `{sys.executable} -m pip install atheris` (Linux and macOS only)",
            file=sys.stderr,
        )
        return 2
    if chosen.child is not None:
        fuzz_here(chosen.child, chosen.seconds)
    seconds = chosen.seconds // len(chosen.target)
    held = [fuzz_target(name, seconds) for name in chosen.target]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
