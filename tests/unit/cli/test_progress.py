import io

import pytest
from rich.console import Console

from flux_nf4.cli import progress
from flux_nf4.cli.progress import BarProgress, LineProgress, Progress, duration, make_progress


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 80 columns that keeps what is written to it."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(progress, "stderr_console", lambda: console)
    return console


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (12.4, "12 s"),
        (59.7, "1 min 0 s"),
        (185, "3 min 5 s"),
        (7440, "2 h 4 min"),
    ],
)
def test_a_duration_is_said_as_people_do(seconds, text):
    assert duration(seconds) == text


def test_a_terminal_gets_a_bar(terminal):
    assert isinstance(make_progress(quiet=False), BarProgress)


def test_a_file_gets_lines(capsys):
    assert isinstance(make_progress(quiet=False), LineProgress)


def test_quiet_gets_nothing(terminal):
    assert type(make_progress(quiet=True)) is Progress


def test_the_bar_shows_stage_image_and_steps(terminal):
    with BarProgress() as bar:
        bar.stage("load")
        bar.plan(2, 4)
        bar.stage("denoise")
        bar.step(1, 4)
        bar.image_done()
        bar.stage("denoise")
        bar.step(2, 4)
    said = terminal.file.getvalue()

    assert "loading the model" in said
    assert "denoising 1 of 2" in said
    assert "denoising 2 of 2" in said
    assert "2/4 steps" in said


def test_the_bar_makes_room_and_comes_back(terminal):
    with BarProgress() as bar:
        bar.plan(1, 4)
        bar.stage("denoise")
        bar.pause()
        terminal.file.seek(0)
        terminal.file.truncate()
        bar.step(3, 4)

        assert "3/4 steps" in terminal.file.getvalue()


def test_fewer_steps_than_ten_get_a_line_each(capsys):
    lines = LineProgress()
    lines.plan(1, 4)
    lines.stage("denoise")
    for step in range(1, 5):
        lines.step(step, 4)

    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "denoising: 20 % (1/4 steps)",
        "denoising: 50 % (2/4 steps)",
        "denoising: 70 % (3/4 steps)",
        "denoising: 100 % (4/4 steps)",
    ]
