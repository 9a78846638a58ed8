"""Paths and small text files as a stranger gives them: `~`, nothing, pipes, names without end."""

import os

import pytest

from flux_nf4.cli.paths import path_of, read_text
from flux_nf4.errors import InputError

TOO_LONG = "x" * 300


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))

    assert path_of("~/cat.png") == tmp_path / "cat.png"


@pytest.mark.parametrize("text", ["", "  ", "a\0b"])
def test_no_path_is_refused(text):
    with pytest.raises(InputError, match="no path at all"):
        path_of(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "a", "-o", "~nobody-has-this-name/cat.png"),
        ("generate", "a", "-m", "~nobody-has-this-name/m.safetensors"),
        ("generate", "a", "--image", "~nobody-has-this-name/cat.png"),
        ("generate", "--prompt-file", "~nobody-has-this-name/prompts"),
        ("generate", "--from", "~nobody-has-this-name/cat.png"),
        ("info", "~nobody-has-this-name"),
        ("verify", "~nobody-has-this-name"),
        ("convert", "~nobody-has-this-name", "b"),
    ],
)
def test_the_home_of_nobody_is_bad_usage(flux, known_words, arguments):
    ended = flux(*arguments)

    assert ended.exit_code == 2
    assert "begins with no home folder" in ended.err


@pytest.mark.parametrize("verb", ["info", "verify"])
def test_an_empty_path_is_not_this_folder(flux, verb):
    assert flux(verb, "").err.startswith("error: a path is empty")


def test_an_empty_model_is_not_this_folder(flux, known_words):
    assert "a path is empty" in flux("generate", "a", "-m", "").err


@pytest.mark.parametrize(
    "arguments", [("generate", "a", "-o", f"{TOO_LONG}.png"), ("verify", TOO_LONG)]
)
def test_a_name_that_no_disk_takes_is_a_disk_error(flux, known_words, arguments):
    ended = flux(*arguments)

    assert ended.exit_code == 7
    assert ended.err.splitlines()[-1].startswith("error: cannot use `xxx")
    assert ended.err.endswith("File name too long\n")


def test_doctor_goes_on_where_a_path_cannot_be_looked_at(flux):
    assert flux("doctor", TOO_LONG).out.endswith("\n1 problem\n")


def test_info_does_not_wait_at_a_pipe(flux, folder):
    os.mkfifo(folder / "pipe")

    assert "is not a regular file" in flux("info", "pipe").err


def test_a_file_without_end_is_not_read_to_its_end():
    with pytest.raises(InputError, match="larger than 16 MiB"):
        read_text("/dev/zero")
