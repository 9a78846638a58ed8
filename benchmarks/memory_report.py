"""Draw `benchmarks.memory`'s results: `python -m benchmarks.memory_report RESULTS --out FOLDER`.

`memory.svg` has a line for each way of running, milliseconds a step over the cap on memory;
`memory.md` the tables: every case of the file, errors as errors. "Of the least" is of what the
step takes uncapped or its bytes take on the bus as measured, whichever is longer.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from math import log10
from pathlib import Path

from benchmarks.waterfall import Record, read
from flux_nf4.pipeline.chart import (
    BLUE,
    GREEN,
    GRID,
    MUTED,
    ORANGE,
    PURPLE,
    Page,
    Panel,
)

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#b45309")
_WIDTH, _HEIGHT, _LEFT, _TOP = 860, 440, 70, 60
_NAMES = 230  # what stands at the right of the lines
_LINE, _CHARACTER = 15, 7.5  # of a name, in pixels
_TICKS = (50, 100, 200, 500, 1000, 2000, 5000)  # milliseconds
_HEAD = (
    "cap, GiB", "ms a step", "of uncapped", "of the least", "GB moved a step", "peak, GiB",
    "planned, GiB", "whole device, GiB", "to the first step, s", "new prompt, s",
)  # fmt: skip


def main() -> None:
    """Read the lines, write the two files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path())
    given = parser.parse_args()
    records = read(given.results)
    ways = by_way(records)
    rates = [each["pinned_bytes_per_s"] for each in records if "pinned_bytes_per_s" in each]
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "memory.svg").write_text(chart(ways), encoding="utf-8")
    (given.out / "memory.md").write_text(
        tables(ways, rates[-1] if rates else None), encoding="utf-8"
    )


def by_way(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The cases of each way of running, the largest cap first; of two runs the later counts."""
    ways: dict[str, dict[float, Record]] = {}
    for record in records:
        if record["case"] in ("ours", "peer"):
            cap = float("inf") if record["cap_gib"] is None else record["cap_gib"]
            ways.setdefault(_name(record), {})[cap] = record
    return {
        name: [cases[cap] for cap in sorted(cases, reverse=True)] for name, cases in ways.items()
    }


def _name(record: Record) -> str:
    if record["case"] == "peer":
        offload = "" if record["offload"] == "none" else f", offload {record['offload']}"
        return f"Diffusers {record['storage']}{offload}"
    storage = (
        "NF4 v2" if record["storage"] == "file" else str(record["storage"]).replace("nf", "NF")
    )
    width, height = record["size"]
    size = "" if width == height else f", {width} x {height}"
    from_file = ", weights read from the file" if record.get("ram") == 0 else ""
    return f"{storage}, {record.get('arithmetic') or 'bf16'}{size}{from_file}"


def chart(ways: Mapping[str, Sequence[Record]]) -> str:
    """Milliseconds a step over the cap; caps stand side by side, the smallest at the right.

    Of images of 1024 x 1024 from main memory, logarithmic; what others take is grey.
    """
    found = {
        name: points
        for name, cases in ways.items()
        if " x " not in name
        and "from the file" not in name
        and (points := {_cap(case): case["step_ms"] for case in cases if "step_ms" in case})
    }
    caps = list(dict.fromkeys(_cap(case) for cases in ways.values() for case in cases))
    caps.sort(key=lambda cap: -float("inf") if cap == "none" else -float(cap))
    page = Page(_WIDTH, _HEIGHT)
    if not found:
        page.text(24, 36, "nothing was measured", colour=MUTED)
        return page.to_svg()
    every = [ms for points in found.values() for ms in points.values()]
    lowest = max((tick for tick in _TICKS if tick <= min(every)), default=min(every))
    range_ms = lowest, 1.1 * max(every)
    panel = Panel(
        page=page,
        left=_LEFT,
        top=_TOP,
        width=_WIDTH - _LEFT - _NAMES,
        height=_HEIGHT - _TOP - 60,
        x_range=(0, max(1, len(caps) - 1)),
        y_range=(log10(range_ms[0]), log10(range_ms[1])),
    )
    panel.title("ms a step, by what tensors may take (names: how weights are stored, arithmetic)")
    for ms in (tick for tick in _TICKS if range_ms[0] <= tick <= range_ms[1]):
        panel.line([(0, log10(ms)), (max(1, len(caps) - 1), log10(ms))], GRID)
        y = panel.at(0, log10(ms))[1] + 4
        page.text(_LEFT - 8, y, f"{ms:,}", anchor="end", colour=MUTED)
    for number, cap in enumerate(caps):
        label = "no cap" if cap == "none" else f"{cap} GiB"
        page.text(
            panel.at(number, log10(lowest))[0], _HEIGHT - 36, label, anchor="middle", colour=MUTED
        )
    colours, names, lines = iter(COLOURS * len(found)), [], []
    for name, points in found.items():
        colour = MUTED if name.startswith("Diffusers") else next(colours)
        places = sorted((caps.index(cap), log10(ms)) for cap, ms in points.items())
        panel.line(places, colour, width=2)
        lines.append([panel.at(x, y) for x, y in places])
        for x, y in places:
            page.dot(*panel.at(x, y), colour, title=f"{name}: {10**y:.1f} ms")
        x, y = panel.at(*places[-1])
        names.append((y + 4, x + 10, name, colour))
    placed: list[tuple[float, float, float]] = []  # left, right, baseline
    # From the lowest up, none on another or on a line.
    for y, x, name, colour in sorted(names, reverse=True):
        right = x + _CHARACTER * len(name)
        heights = [height for line in lines for height in _heights(line, x, right)]
        while any(-5 < y - height < _LINE - 3 for height in heights):
            y -= 1
        for left, end, taken in placed:
            if left < right and x < end and abs(taken - y) < _LINE:
                y = taken - _LINE
        placed.append((x, right, y))
        page.text(x, y, name, colour=colour)
    return page.to_svg()


def _heights(line: Sequence[tuple[float, float]], left: float, right: float) -> Iterator[float]:
    """Where a line enters and leaves what lies between two places."""
    for (x1, y1), (x2, y2) in itertools.pairwise(line):
        if x1 < right and left < x2:
            for x in (max(left, x1), min(right, x2)):
                yield y1 + (y2 - y1) * (x - x1) / (x2 - x1)


def tables(ways: Mapping[str, Sequence[Record]], bus_bytes_per_s: float | None = None) -> str:
    """Markdown, a table for each way of running."""
    lines = []
    for name, cases in ways.items():
        lines += [f"| {name}: {_HEAD[0]} | " + " | ".join(_HEAD[1:]) + " |"]
        lines += ["|" + "---|" * len(_HEAD)]
        full = next((case.get("step_ms") for case in cases if case["cap_gib"] is None), None)
        lines += [_row(case, full, bus_bytes_per_s) for case in cases] + [""]
    return "\n".join(lines)


def _row(case: Record, full_ms: float | None, bus_bytes_per_s: float | None) -> str:
    if "step_ms" not in case:
        error = case["error"].partition(". ")[0]
        return f"| {_cap(case)} | {error} |" + " |" * (len(_HEAD) - 2)
    new = case.get("new_prompt", {})
    share = of_least = ""
    if full_ms is not None and case["cap_gib"] is not None:
        share = f"{case['step_ms'] / full_ms:.3f}"
        if bus_bytes_per_s is not None and new:
            least_ms = max(full_ms, 1000 * new["step_bytes"] / bus_bytes_per_s)
            of_least = f"{case['step_ms'] / least_ms:.3f}"
    values = (
        _cap(case),
        f"{case['step_ms']:.1f}",
        share,
        of_least,
        f"{new['step_bytes'] / 1e9:.2f}" if new else "",
        *(f"{case[key]:.2f}" if case.get(key) else "" for key in (
            "allocated_gib", "planned_gib", "driver_gib", "first_step_s",
        )),
        f"{new['seconds']:.2f}" if new else "",
    )  # fmt: skip
    return "| " + " | ".join(values) + " |"


def _cap(case: Record) -> str:
    return "none" if case["cap_gib"] is None else f"{case['cap_gib']:g}"


if __name__ == "__main__":
    main()
