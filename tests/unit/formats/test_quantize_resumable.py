"""Files written in any order and over several runs."""

import pytest
import torch
from safetensors.torch import save

from flux_nf4.errors import DiskError, InputError
from flux_nf4.formats.header import plan_header
from flux_nf4.formats.resumable import ResumableFiles

TENSORS = {f"tensor{i}": torch.arange(16, dtype=torch.float32) + i for i in range(5)}
WHOLE = save(TENSORS)


def open_files(path, **identity):
    specs = ((name, each.dtype, tuple(each.shape)) for name, each in TENSORS.items())
    return ResumableFiles(path, {"": plan_header(specs)}, {"options": 1, **identity})


def write_some(path, names):
    with open_files(path) as files:
        for name in names:
            files.write("", {name: TENSORS[name]})


def go_on(path):
    """Finish; how many tensors were there already, and what was found."""
    with open_files(path) as files:
        found = len(files.done), files.state
        for name in TENSORS:
            if ("", name) not in files.done:
                files.write("", {name: TENSORS[name]})
        files.check(lambda _num_bytes: None)
        assert len(files.done) == len(TENSORS)
        files.publish()
    return found


def test_a_journal_torn_at_any_byte_costs_only_what_it_no_longer_says(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _descriptor: None)  # 600 times: the disk is not tested
    path = tmp_path / "a"
    journal = tmp_path / "a.partial.journal"
    write_some(path, ["tensor3", "tensor0", "tensor4"])
    data, start = journal.read_bytes(), (tmp_path / "a.partial").read_bytes()
    lengths = []
    for length in range(len(data) + 1):
        (tmp_path / "a.partial").write_bytes(start)
        journal.write_bytes(data[:length])
        if length == 0:
            with pytest.raises(InputError, match="is in the way"):
                go_on(path)
            continue
        lengths.append(go_on(path)[0])
        assert path.read_bytes() == WHOLE
        path.unlink()

    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (0, 3)


def test_what_changed_on_the_disk_is_struck_off(tmp_path):
    write_some(tmp_path / "a", TENSORS)
    with (tmp_path / "a.partial").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with open_files(tmp_path / "a") as files:
        files.check(lambda _num_bytes: None)

        assert set(TENSORS) - {name for _, name in files.done} == {"tensor4"}


def test_a_damaged_header_is_written_again(tmp_path):
    write_some(tmp_path / "a", TENSORS)
    with (tmp_path / "a.partial").open("r+b") as file:
        file.write(b"\xff" * 20)
    go_on(tmp_path / "a")

    assert (tmp_path / "a").read_bytes() == WHOLE


def test_another_identity_begins_anew(tmp_path):
    write_some(tmp_path / "a", ["tensor1"])
    with open_files(tmp_path / "a", source="other") as files:
        assert (files.state, files.done) == ("changed", {})


@pytest.mark.parametrize("damage", ["shorter", "gone", "a link"])
def test_a_partial_file_that_is_not_as_it_was_left_begins_anew(tmp_path, damage):
    write_some(tmp_path / "a", ["tensor1"])
    partial = tmp_path / "a.partial"
    data = partial.read_bytes()
    partial.unlink()
    (tmp_path / "other").write_bytes(data)
    if damage == "shorter":
        partial.write_bytes(data[:-1])
    elif damage == "a link":
        partial.symlink_to(tmp_path / "other")
    assert go_on(tmp_path / "a") == (0, "changed")

    assert (tmp_path / "a").read_bytes() == WHOLE
    assert (tmp_path / "other").read_bytes() == data


def test_a_run_that_got_as_far_as_the_name_is_known(tmp_path):
    write_some(tmp_path / "a", TENSORS)
    assert not open_files(tmp_path / "a").is_published()
    (tmp_path / "a.partial").rename(tmp_path / "a")

    assert open_files(tmp_path / "a").is_published()
    assert not open_files(tmp_path / "a", source="other").is_published()


def test_a_folder_that_is_not_there_is_an_error_of_the_disk(tmp_path):
    with pytest.raises(DiskError), open_files(tmp_path / "no" / "a"):
        pass


def test_discarded_nothing_is_left(tmp_path):
    with open_files(tmp_path / "a") as files:
        files.discard()

    assert list(tmp_path.iterdir()) == []
