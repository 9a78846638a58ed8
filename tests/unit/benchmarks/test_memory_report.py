"""The tables and the chart of what the memory benchmark measured."""

from benchmarks.memory_report import by_way, chart, tables

DRAWN = {"seconds": 2.5, "step_bytes": 4.5e9}


def ours(cap, ms, **values):
    case = {"case": "ours", "storage": "file", "cap_gib": cap, "size": [1024, 1024]}
    measured = {"step_ms": ms, "allocated_gib": 1.25, "driver_gib": 2.0, "new_prompt": DRAWN}
    return case | {"arithmetic": "bf16"} | measured | values


REFUSED = {
    "case": "peer", "storage": "nf4", "offload": "none", "cap_gib": 6.0, "error": "out of memory",
}  # fmt: skip


def test_a_row_says_how_much_slower_than_uncapped():
    text = tables(by_way([ours(2.0, 132.0), ours(None, 120.0)]))
    rows = [line for line in text.splitlines() if line.startswith(("| none", "| 2 "))]
    assert rows[0].startswith("| none | 120.0 |  |  | 4.50 |")
    assert rows[1].startswith("| 2 | 132.0 | 1.100 |  | 4.50 | 1.25 |")


def test_a_row_says_how_far_from_what_the_bus_allows_where_that_was_measured():
    ways = by_way([ours(2.0, 132.0), ours(None, 80.0)])
    assert "| 2 | 132.0 | 1.650 | 1.100 |" in tables(ways, 4.5e9 / 0.120)  # the bus takes 120 ms
    assert "| 2 | 132.0 | 1.650 | 1.650 |" in tables(ways, 4.5e9 / 0.040)


def test_what_failed_says_why():
    assert "| 6 | out of memory |" in tables(by_way([REFUSED]))


def test_where_the_uncapped_case_failed_nothing_is_compared_with_it():
    failed = {key: value for key, value in ours(None, 0).items() if key != "step_ms"}
    text = tables(by_way([failed | {"error": "out of memory"}, ours(2.0, 132.0)]))
    assert "| none | out of memory |" in text
    assert "| 2 | 132.0 |  |" in text


def test_of_two_runs_of_a_case_the_later_counts():
    (cases,) = by_way([ours(2.0, 132.0), ours(2.0, 124.0)]).values()
    assert [case["step_ms"] for case in cases] == [124.0]


def test_every_way_has_a_line_with_its_name():
    svg = chart(by_way([ours(None, 120.0), ours(2.0, 130.0), ours(2.0, 80.0, arithmetic="fp8")]))
    assert "NF4 v2, bf16" in svg
    assert "NF4 v2, fp8" in svg
    assert svg.count("<polyline") >= 2


def test_nothing_measured_is_said():
    assert "nothing was measured" in chart(by_way([REFUSED]))
