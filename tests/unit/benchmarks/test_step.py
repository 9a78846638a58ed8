"""The runner of sections: what is lost with one of them is only itself."""

import json

import pytest

from benchmarks import step


@pytest.fixture
def sections(tmp_path, monkeypatch):
    """Run some sections; -> the lines about them."""

    def run(*options):
        arguments = ["step", "--out", str(tmp_path), "--sizes", "tiny", "--device", "cpu", *options]
        monkeypatch.setattr("sys.argv", arguments)
        step.main()
        lines = (tmp_path / step.FILE).read_text().splitlines()
        return [each for each in map(json.loads, lines) if each["kind"] == "section"]

    return run


def test_every_section_has_a_line_even_without_time(sections):
    found = sections("--limit", "0")

    assert [each["name"] for each in found] == list(step.SECTIONS)
    assert {each["error"] for each in found} == {"no time was left"}


def test_a_section_is_stopped_at_its_limit(sections):
    (found,) = sections("--only", "fp8", "--limit", "0.2")

    assert found["error"] == "stopped after 0 s"


def test_a_section_that_fails_says_why(sections):
    (found,) = sections("--only", "kernels", "--device", "no-such-device")

    assert "`no-such-device` is not a device" in found["error"]
