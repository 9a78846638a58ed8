"""`flux-nf4 quantize` stopped in the middle: killed, interrupted, out of disk, its work damaged."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import save_all_in_one
from safetensors.torch import load_file, save_file

from flux_nf4.formats import resumable
from flux_nf4.formats.tensorfile import TensorFile

KILLER = Path(__file__).with_name("kill_quantize.py")
WRITE_ALL = resumable._write_all


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny model in bf16."""
    return save_all_in_one(
        tmp_path_factory.mktemp("source") / "all.safetensors", transformer=torch.bfloat16
    )


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The bytes of a run that nothing stopped."""
    from flux_nf4.cli import main

    path = tmp_path_factory.mktemp("whole") / "new.safetensors"
    assert main(["quantize", str(source), str(path), "--quiet"]) == 0
    return path.read_bytes()


@pytest.fixture
def stop_after(monkeypatch):
    """`stop_after(n, act)` has `act` called at the n-th write from now on, and at each later."""

    def arrange(num_writes, act):
        count = 0

        def write_all(file, data):
            nonlocal count
            count += 1
            if count >= num_writes:
                act()
            WRITE_ALL(file, data)

        monkeypatch.setattr(resumable, "_write_all", write_all)

    yield arrange
    monkeypatch.setattr(resumable, "_write_all", WRITE_ALL)


def disk_is_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted(flux, source, stop_after, num_writes, *options):
    """A run that found no room after so many writes."""
    stop_after(num_writes, disk_is_full)
    ended = flux("quantize", str(source), "new.safetensors", *options)
    stop_after(10**9, disk_is_full)
    return ended


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- killed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_kills", "options"),
    [(15, ()), (6, ("--layout", "diffusers")), (3, ("--format", "v1"))],
    ids=["file", "folder", "v1"],
)
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(source, tmp_path, num_kills, options):
    done = subprocess.run(
        [sys.executable, KILLER, source, tmp_path, "7", str(num_kills), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    assert sum(row["num_killed"] for row in found["rows"]) >= num_kills
    for row in found["rows"]:
        assert (row["exit_code"], row["same"]) == (0, True), row
        assert row["left"] == ["whole", "whole.manifest.json"], row


# ---- interrupted --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_start_and_says_how_to_go_on(
    flux, source, whole, folder, stop_after, number
):
    signals = [number]
    stop_after(60, lambda: os.kill(os.getpid(), signals.pop()) if signals else None)
    ended = flux("quantize", str(source), "new.safetensors")
    stop_after(10**9, disk_is_full)

    assert ended.exit_code == 128 + number
    assert "the same command goes on" in ended.err
    assert names_in(folder) == ["new.safetensors.partial", "new.safetensors.partial.journal"]
    again = flux("quantize", str(source), "new.safetensors")
    assert "goes on from an earlier run" in again.err
    assert (folder / "new.safetensors").read_bytes() == whole


def test_what_is_done_is_not_done_again(flux, source, whole, folder, stop_after):
    interrupted(flux, source, stop_after, 200)
    ended = flux("quantize", str(source), "new.safetensors", "--json")

    assert json.loads(ended.out)["kept_tensors"] > 50
    assert (folder / "new.safetensors").read_bytes() == whole


# ---- a full disk --------------------------------------------------------------------------------


def test_no_room_is_said_before_anything_is_written(flux, source, folder, monkeypatch):
    monkeypatch.setattr(
        "flux_nf4.pipeline.conversion_output.shutil.disk_usage",
        lambda _path: type("Usage", (), {"free": 1000}),
    )
    ended = flux("quantize", str(source), "new.safetensors")

    assert (ended.exit_code, "has 1,000 free" in ended.err) == (7, True)
    assert names_in(folder) == []


def test_no_room_in_the_middle_keeps_what_is_done(flux, source, whole, folder, stop_after):
    ended = interrupted(flux, source, stop_after, 100)

    assert ended.exit_code == 7
    assert "No space left" in ended.err
    assert "the same command goes on" in ended.err
    assert not (folder / "new.safetensors").exists()
    assert flux("quantize", str(source), "new.safetensors").exit_code == 0
    assert (folder / "new.safetensors").read_bytes() == whole


def test_a_real_disk_that_fills_up_is_the_same(
    flux, source, whole, folder, monkeypatch, stop_after
):
    disk = folder / "disk"
    disk.mkdir()
    size = f"size={len(whole) // 2 // 4096 * 4}k"
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)]
    is_mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    monkeypatch.setattr("flux_nf4.pipeline.quantization.check_room", lambda *_: None)
    if not is_mounted:  # not allowed to mount: a writer that finds no room stands for it
        stop_after(100, disk_is_full)
    try:
        ended = flux("quantize", str(source), "disk/new.safetensors")
        assert (ended.exit_code, (disk / "new.safetensors").exists()) == (7, False)
        if is_mounted:
            bigger = ["mount", "-o", "remount,size=64m", str(disk)]
            subprocess.run(bigger, check=True)
        stop_after(10**9, disk_is_full)
        assert flux("quantize", str(source), "disk/new.safetensors").exit_code == 0
        assert (disk / "new.safetensors").read_bytes() == whole
    finally:
        if is_mounted:
            subprocess.run(["umount", str(disk)], check=True)


def test_what_was_there_stays_when_the_disk_fills_up(flux, source, folder, stop_after):
    (folder / "new.safetensors").write_text("mine")
    ended = interrupted(flux, source, stop_after, 100, "--force")

    assert (ended.exit_code, (folder / "new.safetensors").read_text()) == (7, "mine")


# ---- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_byte_in_the_partial_file_is_made_good(
    flux, source, whole, folder, stop_after, seed
):
    interrupted(flux, source, stop_after, 300)
    path = folder / "new.safetensors.partial"
    data = bytearray(path.read_bytes())
    data[random.Random(seed).randrange(len(data))] ^= 0x10
    path.write_bytes(data)
    flux("quantize", str(source), "new.safetensors")

    assert (folder / "new.safetensors").read_bytes() == whole


@pytest.mark.parametrize("seed", range(6))
def test_a_journal_torn_or_flipped_anywhere_is_safe(flux, source, whole, folder, stop_after, seed):
    interrupted(flux, source, stop_after, 300)
    path = folder / "new.safetensors.partial.journal"
    data = bytearray(path.read_bytes())
    position = random.Random(seed).randrange(len(data))
    data[position] ^= 0x10
    path.write_bytes(data if seed % 2 else data[:position])
    ended = flux("quantize", str(source), "new.safetensors")

    assert ended.exit_code == 0
    assert (folder / "new.safetensors").read_bytes() == whole


def test_a_source_that_changed_begins_anew_and_says_so(flux, source, folder, stop_after):
    copy = folder / "copy.safetensors"
    copy.write_bytes(source.read_bytes())
    interrupted(flux, copy, stop_after, 100)
    tensors = {
        name: each.neg() if each.dtype == torch.bfloat16 else each
        for name, each in load_file(copy).items()
    }
    save_file(tensors, copy, metadata=TensorFile(copy).metadata)
    ended = flux("quantize", str(copy), "new.safetensors")
    flux("quantize", str(copy), "other.safetensors")

    assert "begins anew" in ended.err
    assert (folder / "new.safetensors").read_bytes() == (folder / "other.safetensors").read_bytes()


@pytest.mark.parametrize("options", [("--scale", "search"), ("--block-size", "128")])
def test_other_options_begin_anew_and_say_so(flux, source, folder, stop_after, options):
    interrupted(flux, source, stop_after, 100)
    ended = flux("quantize", str(source), "new.safetensors", *options)
    flux("quantize", str(source), "other.safetensors", *options)

    assert "begins anew" in ended.err
    assert (folder / "new.safetensors").read_bytes() == (folder / "other.safetensors").read_bytes()


def test_a_partial_file_of_somebody_else_is_left_alone(flux, source, folder):
    (folder / "new.safetensors.partial").write_text("mine")
    ended = flux("quantize", str(source), "new.safetensors")

    assert (ended.exit_code, "is in the way" in ended.err) == (2, True)
    assert names_in(folder) == ["new.safetensors.partial"]
    assert (folder / "new.safetensors.partial").read_text() == "mine"


def test_two_runs_do_not_write_one_result(flux, source, folder, stop_after):
    interrupted(flux, source, stop_after, 100)
    import fcntl

    with (folder / "new.safetensors.partial.journal").open("rb") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        ended = flux("quantize", str(source), "new.safetensors")

    assert (ended.exit_code, "another process is writing" in ended.err) == (2, True)


def test_a_report_of_a_run_that_goes_on_still_has_every_layer(flux, source, folder, stop_after):
    interrupted(flux, source, stop_after, 300)
    flux("quantize", str(source), "new.safetensors", "--report", "report.json")
    names = [
        name for name in TensorFile(folder / "new.safetensors").names if name.endswith(".absmax")
    ]

    assert len(json.loads((folder / "report.json").read_text())["layers"]) == len(names)
