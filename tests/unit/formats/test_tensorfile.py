import json
import os
import pickle
import struct
import subprocess
import sys
import weakref
import zipfile
from pathlib import Path

import pytest
import torch
from tensor_files import write_tensor_file

from flux_nf4.errors import DiskError, FormatError, InputError, ModelNotFoundError
from flux_nf4.formats.header import MAX_HEADER_BYTES
from flux_nf4.formats.tensorfile import TensorFile, TensorSource, write_sources


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.safetensors"
    write_tensor_file(path, {"a": torch.arange(6.0).view(2, 3)}, metadata={"k": "v"})
    return path


def test_a_tensor_reads_back_as_written(good):
    assert torch.equal(TensorFile(good).tensor("a"), torch.arange(6.0).view(2, 3))


def test_metadata_reads_back_as_written(good):
    assert TensorFile(good).metadata == {"k": "v"}


def test_num_bytes_is_the_length_of_the_file(good):
    assert TensorFile(good).num_bytes == good.stat().st_size


def test_an_aligned_tensor_is_not_copied(good):
    file = TensorFile(good)
    assert file.tensor("a").data_ptr() == file.tensor("a").data_ptr()


def test_writing_into_a_tensor_does_not_change_the_file(good):
    before = good.read_bytes()
    tensor = TensorFile(good).tensor("a")
    tensor.zero_()
    assert good.read_bytes() == before


def test_a_tensor_outlives_its_file(good):
    tensor = TensorFile(good).tensor("a")
    good.unlink()
    assert tensor.sum() == 15


def test_an_unaligned_tensor_is_read_right(tmp_path):
    header = {
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    path = raw_file(tmp_path / "a.safetensors", header, b"\1" + struct.pack("<2f", 1.5, -2.0))
    assert TensorFile(path).tensor("a").tolist() == [1.5, -2.0]


def test_an_unknown_name_is_a_format_error(good):
    with pytest.raises(FormatError, match="holds no tensor `b`"):
        TensorFile(good).tensor("b")


def test_a_file_without_tensors_is_read(tmp_path):
    write_tensor_file(tmp_path / "empty.safetensors", {})
    assert TensorFile(tmp_path / "empty.safetensors").names == ()


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (2, 0, 2)])
def test_scalars_and_empty_tensors_survive(tmp_path, shape):
    write_tensor_file(tmp_path / "a", {"a": torch.ones(shape, dtype=torch.bfloat16)})
    assert TensorFile(tmp_path / "a").tensor("a").shape == shape


def test_strided_tensors_are_written_in_row_major_order(tmp_path):
    tensor = torch.arange(6.0).view(2, 3).T
    write_tensor_file(tmp_path / "a", {"a": tensor})
    assert torch.equal(TensorFile(tmp_path / "a").tensor("a"), tensor)


def test_every_truncation_is_refused(good):
    data = good.read_bytes()
    for length in range(len(data)):
        good.write_bytes(data[:length])
        with pytest.raises(FormatError):
            TensorFile(good)


def test_a_truncated_file_says_so_and_what_to_do(good):
    good.write_bytes(good.read_bytes()[:-4])
    with pytest.raises(FormatError, match="but its header describes") as caught:
        TensorFile(good)
    assert caught.value.hint == "was the download cut short? get it again"


def test_trailing_bytes_are_refused(good):
    good.write_bytes(good.read_bytes() + b"\0")
    with pytest.raises(FormatError, match="header describes"):
        TensorFile(good)


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 100_000_001, 2**63, 2**64 - 1])
def test_a_header_length_beyond_the_limit_is_refused_unread(tmp_path, length):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(FormatError, match="would mean a header"):
        TensorFile(path)


def zip_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps({"a": 1}, protocol=2) + b" " * 20, "pickle"),
        (pickle.dumps({"a": 1}, protocol=4), "pickle"),
        (b"GGUF" + bytes(40), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"<html><head>", "web page"),
        (b"", "too few"),
        (b"abc", "too few"),
    ],
    ids=["pickle2", "pickle4", "gguf", "lfs", "doctype", "html", "empty", "short"],
)
def test_another_kind_of_file_is_called_by_its_name(tmp_path, data, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message):
        TensorFile(path)


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (b"GGUF" + bytes(40), "safetensors version"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "download it again"),
        (b"<!DOCTYPE html><html>", "download it again"),
    ],
    ids=["gguf", "lfs", "html"],
)
def test_what_stands_in_place_of_the_file_is_downloaded_again(tmp_path, data, hint):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        TensorFile(path)

    assert hint in str(caught.value.hint)


def test_a_zip_archive_is_called_by_its_name(tmp_path):
    zip_archive(tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="zip archive"):
        TensorFile(tmp_path / "model.safetensors")


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(ModelNotFoundError, match="No such file"):
        TensorFile(tmp_path / "no.safetensors")


def test_a_folder_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="not a regular file"):
        TensorFile(tmp_path)


def test_a_named_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        TensorFile(tmp_path / "pipe")


def num_open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_opening_leaves_no_open_descriptor(good):
    before = num_open_descriptors()
    file = TensorFile(good)
    bad = good.with_name("bad.safetensors")
    bad.write_bytes(b"no")
    with pytest.raises(FormatError):
        TensorFile(bad)
    # The mapping keeps one descriptor of its own.
    assert num_open_descriptors() <= before + 1
    assert file.names == ("a",)


def test_opening_a_sparse_giant_reads_its_header_only(tmp_path):
    header = {"a": {"dtype": "U8", "shape": [2**36], "data_offsets": [0, 2**36]}}
    path = raw_file(tmp_path / "giant.safetensors", header)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 2**36)
    assert TensorFile(path).tensor("a")[-1] == 0


def test_a_failing_source_leaves_nothing_behind(tmp_path):
    def fail():
        raise KeyboardInterrupt

    sources = {"a": TensorSource(dtype=torch.uint8, shape=(4,), make=fail)}
    with pytest.raises(KeyboardInterrupt):
        write_sources(tmp_path / "a.safetensors", sources)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_disk_error_and_leaves_nothing_behind(tmp_path):
    # A limit on the size of files is the full disk that needs no privileges; EFBIG for ENOSPC.
    program = (
        "import resource, signal, sys, torch\n"
        "from flux_nf4.errors import DiskError\n"
        "from flux_nf4.formats.tensorfile import TensorSource, write_sources\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    write_sources(sys.argv[1], {'a': TensorSource.of(torch.zeros(1_000_000))})\n"
        "except DiskError as error:\n"
        "    sys.exit(error.exit_code)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.safetensors")]
    assert subprocess.run(command, check=False).returncode == 7
    assert not list(tmp_path.iterdir())


def test_a_folder_without_permission_is_a_disk_error(tmp_path, monkeypatch):
    def refuse(path, flags, mode=0o777):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DiskError, match="Permission denied") as caught:
        write_tensor_file(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    assert "who may write" in (caught.value.hint or "")


def test_a_refused_name_is_found_before_anything_is_written(tmp_path):
    with pytest.raises(FormatError):
        write_tensor_file(tmp_path / "a.safetensors", {"../a": torch.zeros(1)})
    assert not list(tmp_path.iterdir())


def test_a_tensor_is_gone_before_the_next_is_made(tmp_path):
    alive, most = weakref.WeakSet(), []

    def make():
        tensor = torch.zeros(4, dtype=torch.uint8)
        most.append(len(alive))
        alive.add(tensor)
        return tensor

    source = TensorSource(dtype=torch.uint8, shape=(4,), make=make)
    write_sources(tmp_path / "a.safetensors", dict.fromkeys("abc", source))
    assert most == [0, 0, 0]


def test_bytes_are_read_past_the_mapping(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensor_file(path, {"a": torch.arange(5.0), "b": torch.arange(7, dtype=torch.uint8)})
    file = TensorFile(path)
    read = torch.zeros(3, dtype=torch.uint8)
    part = file.tensor("b")[2:5]
    file.read_into(read.numpy().data, file.offset_of(part))

    assert torch.equal(read, part)


def test_only_what_lies_in_the_file_as_it_is_has_an_offset(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensor_file(path, {"a": torch.ones(4, 4)})
    file = TensorFile(path)

    assert file.offset_of(file.tensor("a").clone()) is None
    assert file.offset_of(file.tensor("a")[:, 1:]) is None


def test_a_file_that_has_become_shorter_is_told(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensor_file(path, {"a": torch.ones(4)})
    file = TensorFile(path)
    offset = file.offset_of(file.tensor("a"))
    os.truncate(path, offset + 4)

    with pytest.raises(FormatError, match="become shorter"):
        file.read_into(torch.zeros(16, dtype=torch.uint8).numpy().data, offset)


def test_a_file_that_was_replaced_is_told(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensor_file(path, {"a": torch.ones(4)})
    file = TensorFile(path)
    write_tensor_file(path, {"a": torch.zeros(4)})

    with pytest.raises(FormatError, match="was replaced"):
        file.read_into(torch.zeros(16, dtype=torch.uint8).numpy().data, 8)
