"""Draw what `benchmarks.step` measured: `python -m benchmarks.waterfall step.jsonl --out FOLDER`.

`waterfall.svg` has a panel for each arithmetic: how much longer a step takes without each trick,
and the error of the step's output beside it. `table.md` is the README's table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flux_nf4.pipeline.chart import BLUE, MUTED, ORANGE, Page, Panel, ticks

_WIDTH, _NAMES, _ERRORS = 860, 220, 100
_ROW, _HEAD = 26, 84
_GIB = 2**30

Record = Mapping[str, Any]


def main() -> None:
    """Read the lines, write the two files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path())
    given = parser.parse_args()
    records = read(given.results)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "waterfall.svg").write_text(waterfall_svg(records), encoding="utf-8")
    (given.out / "table.md").write_text(table(records), encoding="utf-8")


def read(path: Path) -> list[Record]:
    """Every record of a file of JSON lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def gains(records: Sequence[Record], arithmetic: str) -> list[tuple[str, float, float]]:
    """What is left out, the milliseconds a step without it, its error; `nothing` comes first.

    Of several runs the last counts; what failed is not there.
    """
    found = {
        record["without"]: (1000 * record["step"]["median"], record["relative_error"])
        for record in records
        if record["kind"] == "waterfall"
        and record["arithmetic"] == arithmetic
        and record.get("step")
    }
    if "nothing" not in found:
        return []
    full = found.pop("nothing")
    ordered = sorted(found.items(), key=lambda item: -item[1][0])
    return [("nothing", *full), *((name, *values) for name, values in ordered)]


def waterfall_svg(records: Sequence[Record]) -> str:
    """One panel below the other, on one scale of time."""
    panels = {name: gains(records, name) for name in ("bf16", "fp8", "int8")}
    panels = {name: rows for name, rows in panels.items() if rows}
    page = Page(_WIDTH, sum(_HEAD + _ROW * len(rows) + 40 for rows in panels.values()) or 60)
    if not panels:
        page.text(24, 36, "no waterfall was measured", colour=MUTED)
        return page.to_svg()
    longest = max(ms for rows in panels.values() for _, ms, _ in rows)
    top = 0.0
    for name, rows in panels.items():
        _draw(page, top + _HEAD, f"a step in {name}", rows, longest)
        top += _HEAD + _ROW * len(rows) + 40
    return page.to_svg()


def _draw(
    page: Page, top: float, title: str, rows: Sequence[tuple[str, float, float]], longest: float
) -> None:
    panel = Panel(
        page=page,
        left=_NAMES,
        top=top,
        width=_WIDTH - _NAMES - _ERRORS - 130,
        height=_ROW * len(rows),
        x_range=(0, 1.05 * longest),
        y_range=(len(rows), 0),
    )
    panel.title(title)
    page.text(_WIDTH - _ERRORS, top - 8, "error", colour=MUTED)
    full = rows[0][1]
    for number, (name, ms, error) in enumerate(rows):
        middle = top + _ROW * (number + 0.5) + 4
        label = "everything on" if name == "nothing" else f"without {name}"
        page.text(_NAMES - 10, middle, label, anchor="end")
        for start, stop, colour in ((0.0, min(full, ms), BLUE), (full, ms, ORANGE)):
            if stop > start:
                corners = ((start, 0.15), (stop, 0.15), (stop, 0.85), (start, 0.85))
                page.area([panel.at(x, number + y) for x, y in corners], colour)
        gain = "" if name == "nothing" else f" ({ms - full:+.1f})"
        page.text(panel.at(ms, 0)[0] + 6, middle, f"{ms:.1f} ms{gain}", colour=MUTED)
        page.text(_WIDTH - _ERRORS, middle, f"{100 * error:.2f} %", colour=MUTED)
    for value in ticks(0, 1.05 * longest):
        x, y = panel.at(value, len(rows))
        page.text(x, y + 18, f"{value:g}", anchor="middle", colour=MUTED)


def table(records: Sequence[Record]) -> str:
    """Markdown: what, milliseconds a step (20th to 80th percentile), GiB, error, for each shape."""
    errors = {
        f"flux-nf4 {record['arithmetic']}": record.get("relative_error")
        for record in records
        if record["kind"] == "waterfall" and record["without"] == "nothing"
    }
    shapes: dict[tuple[int, int], dict[str, Record]] = {}
    for record in records:
        if record["kind"] in ("drawing", "step", "peer"):
            settings = record["settings"]
            shapes.setdefault((settings["width"], settings["batch"]), {})[record["name"]] = record
    lines = []
    for (side, batch), rows in shapes.items():
        several = f", {batch} at once" if batch > 1 else ""
        head = f"| {side} x {side}{several} | ms a step | GiB | error |"
        lines += [head, "|---|---|---|---|"]
        lines += [
            _line(row, errors.get(name) if (side, batch) == next(iter(shapes)) else None)
            for name, row in sorted(rows.items(), key=lambda item: _speed(item[1]))
        ]
        lines.append("")
    return "\n".join([*lines, *_origin(records), ""])


def _speed(record: Record) -> float:
    return record["step"]["median"] if record.get("step") else float("inf")


def _line(record: Record, error: float | None) -> str:
    error = record.get("relative_error", error)
    step, peak = record.get("step"), record.get("peak")
    if step is None:
        return f"| {record['name']} | {record['error']} | | |"
    if record["kind"] == "drawing":
        peak = record["warm"]["peaks"].get("denoise")
    low, middle, high = (1000 * step[key] for key in ("p20", "median", "p80"))
    memory = f"{peak['allocated'] / _GIB:.2f}" if peak else ""
    relative = "" if error is None else f"{100 * error:.1f} %"
    return f"| {record['name']} | {middle:.1f} ({low:.1f} to {high:.1f}) | {memory} | {relative} |"


def _origin(records: Sequence[Record]) -> list[str]:
    """The machine and the versions, which are the same for all lines of a run."""
    record = next((each for each in records if "device" in each), None)
    if record is None:
        return []
    device = record["device"]
    driver = f", driver {device['driver']}" if device.get("driver") else ""
    versions = (f"{name} {version}" for name, version in record["versions"].items() if version)
    return [
        f"{device['name']}{driver}; {', '.join(versions)}; commit {record['commit']}, "
        f"{record['date'][:10]}; random weights of {record.get('sizes', 'the model')}. Medians, "
        "20th to 80th percentile; error: of one step's output against float32, in the 2-norm."
    ]


if __name__ == "__main__":
    main()
