import contextlib
import io
import json

import pytest

from flux_nf4.cli import main

RECORD = {
    "model", "settings", "date", "commit", "device", "versions", "schema", "kind", "name", "load_s",
    "batch_size", "first", "warm", "step", "ceilings", "share", "error",
}  # fmt: skip


# Random weights at the demo's sizes, as small as it gets.
BENCH = ("bench", "--random", "tiny", "-s", "64", "--steps", "2")


@pytest.fixture
def bench(flux):
    return lambda *more: flux(*BENCH, *more)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The lines of a report, and the file that its results were added to."""
    path, report = tmp_path_factory.mktemp("bench") / "results.jsonl", io.StringIO()
    path.write_text('{"kind": "older"}\n')
    with contextlib.redirect_stdout(report):
        assert main([*BENCH, "-o", str(path)]) == 0
    return report.getvalue().splitlines(), path


def test_a_line_of_json_holds_everything_that_a_measurement_depends_on(bench):
    (record,) = bench("--json").json_lines

    assert record.keys() == RECORD


def test_the_settings_are_those_that_were_run(bench):
    (record,) = bench("--json", "-n", "2", "--arithmetic", "int8").json_lines
    settings = record["settings"]

    assert (settings["width"], settings["steps"], settings["batch"]) == (64, 2, 2)
    assert settings["arithmetic"] == "int8"


def test_results_are_appended_to_a_file(measured):
    _, path = measured
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]

    assert kinds == ["older", "drawing"]


def test_the_report_ends_with_the_ceilings(measured):
    report, _ = measured
    assert report[-1].startswith("measured ceilings: ")


def test_random_weights_are_called_so(measured):
    report, _ = measured
    assert "random weights" in report[0]


def test_a_model_and_random_weights_are_refused_together(flux):
    ended = flux("bench", "-m", "demo", "--random", "tiny")

    assert ended.exit_code == 2
    assert "`--model` and `--random` are two models" in ended.err


def test_a_missing_folder_is_found_before_anything_is_measured(bench, tmp_path):
    ended = bench("-o", str(tmp_path / "absent" / "results.jsonl"))

    assert (ended.exit_code, ended.out) == (7, "")


def test_peers_that_are_not_installed_are_said_before_anything_is_measured(bench, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    ended = bench("--compare")

    assert ended.exit_code != 0
    assert "Diffusers" in ended.err
    assert "flux-nf4[compare]" in ended.err


def test_a_folder_in_the_place_of_the_results_is_told_before_measuring(bench, tmp_path):
    ended = bench("-o", str(tmp_path))

    assert ended.exit_code == 7
    assert ended.err.startswith(f"error: `{tmp_path}` is a folder")


def test_a_locked_folder_for_the_results_is_told_before_measuring(bench, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    ended = bench("-o", "results.jsonl")

    assert (ended.exit_code, ended.out) == (7, "")
    assert ended.err.startswith("error: no permission to write to `.`")


@pytest.mark.parametrize("verb", ["bench", "plan"])
def test_no_size_is_drawn_by_an_empty_image(flux, verb):
    assert "a width of 0 pixels cannot be drawn" in flux(verb, "-s", "0").err
