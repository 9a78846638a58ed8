"""Kill `quantize` at random moments, start it again, and tell what became of it, as JSON.

    python kill_quantize.py SOURCE FOLDER SEED NUM_KILLS OPTION...

A program of its own: it forks after its imports, which costs milliseconds where starting anew
costs seconds, and forking is sound only where no threads are. A child kills itself with SIGKILL
at the n-th moment: before, halfway through and after every write, flush, rename and removal.
"""

import contextlib
import json
import os
import random
import signal
import sys
from pathlib import Path

from flux_nf4.cli import main
from flux_nf4.formats import atomic, resumable
from flux_nf4.pipeline import quantization, quantizer  # noqa: F401  imported before the forks


class Moments:
    """Counts moments; at the last one this process ends."""

    def __init__(self, last):
        self.count = 0
        self.last = last

    def pass_one(self):
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, place, name):
        original = getattr(place, name)

        def watched(*arguments, **options):
            self.pass_one()
            result = original(*arguments, **options)
            self.pass_one()
            return result

        setattr(place, name, watched)

    def halve_writes(self):
        original = resumable._write_all

        def write_all(file, data):
            self.pass_one()
            original(file, data[: len(data) // 2])
            self.pass_one()
            original(file, data[len(data) // 2 :])
            self.pass_one()

        resumable._write_all = write_all


def run(arguments, last):
    """Run in a child; its exit code (-9: killed), and the moments of a run that was not."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        moments = Moments(last)
        moments.halve_writes()
        for place, name in (
            (os, "fsync"),
            (Path, "replace"),
            (Path, "rename"),
            (Path, "unlink"),
            (resumable, "flush_folder"),
            (atomic, "flush_folder"),
            (quantization, "write_manifest"),
            (resumable.ResumableFiles, "_create"),
            (resumable.ResumableFiles, "_take_lock"),
        ):
            moments.around(place, name)
        with contextlib.suppress(BaseException):
            exit_code = main(arguments)
            os.write(writer, str(moments.count).encode())
            os._exit(exit_code)
        os._exit(99)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        return os.waitstatus_to_exitcode(status), int(file.read() or 0)


def tree(path):
    """Relative path -> bytes."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {
        str(each.relative_to(path)): each.read_bytes()
        for each in path.rglob("*.*")
        if each.is_file()
    }


def kill_and_go_on(source, folder, seed, num_kills, options):
    """One row for each seed: what was killed, how it ended, and whether all is as it must be."""
    arguments = ["quantize", source, str(folder / "whole"), "--quiet", *options]
    # Here first, so that every import is done before the forks; its threads have ended by then.
    assert main(arguments) == 0
    whole = tree(folder / "whole")
    exit_code, num_moments = run([*arguments, "--force"], 0)
    assert (exit_code, tree(folder / "whole") == whole) == (0, True)
    rows = []
    for number in range(num_kills):
        chance = random.Random(f"{seed} {number}")
        place = folder / f"run{number}"
        place.mkdir()
        target = place / "whole"
        arguments[2] = str(target)
        killed = []
        # Every third time while the finished files get their names, which is soon over.
        first = 1 if number % 3 else num_moments - 30
        last = chance.randrange(first, num_moments + 1)
        while last:
            exit_code, _ = run(arguments, last)
            killed.append(exit_code)
            is_good = not target.exists() or tree(target) == whole
            assert is_good, f"a wrong result after moment {last}"
            last = chance.randrange(1, num_moments + 1) if chance.random() < 0.4 else 0
        # A later run has fewer moments, and may have come to its end; or nothing was left to do.
        if target.exists() and not target.with_name("whole.partial.journal").exists():
            exit_code = 0
        else:
            exit_code, _ = run(arguments, 0)
        rows.append(
            {
                "num_killed": killed.count(-9),
                "exit_code": exit_code,
                "same": tree(target) == whole,
                "left": sorted(each.name for each in place.iterdir()),
            }
        )
    return {"num_moments": num_moments, "rows": rows}


if __name__ == "__main__":
    _, source, folder, seed, num_kills, *options = sys.argv
    found = kill_and_go_on(source, Path(folder), seed, int(num_kills), options)
    sys.stdout.write(json.dumps(found))
