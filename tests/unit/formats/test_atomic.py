import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from flux_nf4.errors import DiskError, InputError
from flux_nf4.formats.atomic import atomic_file


def fail_half_way(path, error):
    with atomic_file(path) as file:
        file.write(b"half")
        raise error


def write(path, data=b"new"):
    with atomic_file(path) as file:
        file.write(data)


def test_the_file_holds_what_was_written(tmp_path):
    write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_nothing_else_is_left_in_the_folder(tmp_path):
    write(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_the_mode_comes_from_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write(tmp_path / "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(error):
        fail_half_way(path, error)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"old"}


@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.ENOSPC, "free some space"), (errno.EDQUOT, "quota"), (errno.EIO, "write elsewhere")],
)
def test_a_disk_fault_is_a_disk_error_with_a_hint(tmp_path, number, hint):
    with pytest.raises(DiskError) as caught, atomic_file(tmp_path / "a"):
        raise OSError(number, os.strerror(number))
    assert hint in (caught.value.hint or "")
    assert not list(tmp_path.iterdir())


def test_a_failing_flush_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskError, match="No space left"):
        write(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_the_file_is_flushed_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    flush, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("flush"), flush(fd)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (calls.append("rename"), replace(a, b))[1])
    write(tmp_path / "a")
    assert calls == ["flush", "rename", "flush"]


def test_a_missing_folder_is_a_disk_error(tmp_path):
    with pytest.raises(DiskError, match="No such file or directory") as caught:
        write(tmp_path / "no" / "a")
    assert caught.value.hint == "make the folder first, or check its name"


def test_a_file_in_place_of_the_folder_is_a_disk_error(tmp_path):
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(DiskError):
        write(tmp_path / "f" / "a")


def test_a_name_too_long_is_a_disk_error(tmp_path):
    with pytest.raises(DiskError, match="too long"):
        write(tmp_path / ("a" * 300))


def test_a_folder_is_not_overwritten(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        write(tmp_path)


def test_a_device_is_not_replaced():
    with pytest.raises(InputError, match="not a regular file"):
        write(os.devnull)
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


def test_a_nul_in_the_path_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="NUL"):
        write(f"{tmp_path}/a\0b")


def test_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write(link)
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_ctrl_c_in_another_process_leaves_nothing_behind(tmp_path):
    program = (
        "import signal, sys, time\n"
        "from flux_nf4.formats.atomic import atomic_file\n"
        # A shell starts what it puts in the background with SIGINT ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with atomic_file(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush(); print('ready', flush=True)\n"
        "    while True:\n"
        "        time.sleep(0.05)\n"  # a signal in the moment before the sleep is handled after it
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.readline()
        num_files = len(list(tmp_path.iterdir()))
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
    assert num_files == 1
    assert not list(tmp_path.iterdir())
