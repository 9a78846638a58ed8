"""Pictures and tables from a few lines, as `benchmarks.step` writes them."""

import json

import pytest

from benchmarks import waterfall


def trick(without, seconds, error=0.01, arithmetic="fp8"):
    step = seconds and {"median": seconds, "p20": seconds, "p80": seconds, "count": 3}
    return {
        "kind": "waterfall",
        "arithmetic": arithmetic,
        "without": without,
        "step": step,
        "relative_error": error,
        "error": None,
    }


def row(name, seconds, side=1024, kind="peer", **more):
    step = {"median": seconds, "p20": 0.9 * seconds, "p80": 1.1 * seconds, "count": 3}
    settings = {"width": side, "height": side, "batch": 1}
    return {"kind": kind, "name": name, "settings": settings, "step": step, "error": None} | more


PEAKS = {"denoise": {"allocated": 5 * 2**30, "reserved": 6 * 2**30, "driver": 7 * 2**30}}
RECORDS = [
    trick("nothing", 0.080),
    trick("fused join", 0.090),
    trick("modulation table", 0.100),
    trick("scratch buffer", None),
    row("flux-nf4 fp8", 0.080, kind="drawing", warm={"peaks": PEAKS}),
    row("Diffusers", 0.160, relative_error=0.02),
    row("Diffusers, compiled", 1.0) | {"step": None, "error": "out of memory"},
    {"kind": "section", "name": "fp8", "error": None},
]


def test_the_costliest_to_lose_comes_first_after_the_whole():
    names = [name for name, _, _ in waterfall.gains(RECORDS, "fp8")]

    assert names == ["nothing", "modulation table", "fused join"]


def test_an_arithmetic_without_a_whole_has_no_panel():
    assert waterfall.gains(RECORDS[1:], "fp8") == []


@pytest.mark.parametrize(
    "shown", ["everything on", "without fused join", "90.0 ms (+10.0)", "1.00 %"]
)
def test_the_drawing_names_each_trick_and_its_gain(shown):
    assert shown in waterfall.waterfall_svg(RECORDS)


def test_the_table_puts_the_fastest_first():
    lines = waterfall.table(RECORDS).splitlines()

    assert lines[2] == "| flux-nf4 fp8 | 80.0 (72.0 to 88.0) | 5.00 | 1.0 % |"
    assert lines[3] == "| Diffusers | 160.0 (144.0 to 176.0) |  | 2.0 % |"


def test_the_table_says_what_ran_out_of_memory():
    assert "| Diffusers, compiled | out of memory | | |" in waterfall.table(RECORDS)


def test_files_are_written_from_a_file_of_lines(tmp_path, monkeypatch):
    lines = tmp_path / "step.jsonl"
    lines.write_text("\n".join(map(json.dumps, RECORDS)))
    monkeypatch.setattr("sys.argv", ["waterfall", str(lines), "--out", str(tmp_path / "out")])
    waterfall.main()

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "table.md",
        "waterfall.svg",
    ]
