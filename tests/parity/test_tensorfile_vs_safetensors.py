"""safetensors reads what we write, we read what it writes, and the bytes are the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import load, load_file, save, save_file
from tensor_files import write_tensor_file

from flux_nf4.errors import FormatError
from flux_nf4.formats.dtypes import DTYPES
from flux_nf4.formats.tensorfile import TensorFile

NAMES = st.text(
    st.characters(categories=["L", "N", "P", "S"], exclude_characters="/\\"),
    min_size=1,
    max_size=12,
).filter(lambda name: name not in ("__metadata__", ".."))
SHAPES = st.lists(st.integers(0, 4), max_size=4)


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def same(left, right):
    return (
        left.keys() == right.keys()
        and all(left[n].dtype == right[n].dtype and left[n].shape == right[n].shape for n in left)
        and all(torch.equal(bits(left[n]), bits(right[n])) for n in left)
    )


def filled(dtype, shape):
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return (torch.arange(num_bytes) % 2).to(torch.uint8).view(dtype).view(shape)


@st.composite
def tensor_files(draw):
    specs = draw(
        st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPES)), SHAPES), max_size=6)
    )
    tensors = {name: filled(DTYPES[dtype], shape) for name, (dtype, shape) in specs.items()}
    # Never an empty dictionary: with it safetensors 0.8 writes a header that it cannot read. At
    # most one entry, as the library writes several in a random order.
    return tensors, draw(st.none() | st.dictionaries(NAMES, NAMES, min_size=1, max_size=1))


@settings(max_examples=60, deadline=None)
@given(file=tensor_files())
def test_our_bytes_are_the_library_s_bytes(file, tmp_path_factory):
    tensors, metadata = file
    path = tmp_path_factory.mktemp("bytes") / "a.safetensors"
    write_tensor_file(path, tensors, metadata=metadata)
    assert path.read_bytes() == save(tensors, metadata=metadata)


@settings(max_examples=60, deadline=None)
@given(file=tensor_files())
def test_we_read_what_the_library_writes(file, tmp_path_factory):
    tensors, metadata = file
    path = tmp_path_factory.mktemp("read") / "a.safetensors"
    save_file(tensors, path, metadata=metadata)
    found = TensorFile(path)
    assert same({name: found.tensor(name) for name in found.names}, tensors)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_library_reads_what_we_write(tmp_path, dtype):
    tensors = {"a": filled(dtype, (3, 5)), "b": filled(torch.uint8, (1,))}
    path = tmp_path / "a.safetensors"
    write_tensor_file(path, tensors, metadata={"k": "v"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"k": "v"}
        assert same({name: file.get_tensor(name) for name in tensors}, tensors)


def test_load_file_reads_what_we_write(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16()}
    write_tensor_file(tmp_path / "a.safetensors", tensors)
    assert same(load_file(tmp_path / "a.safetensors"), tensors)


VALID = save(
    {"a": torch.arange(4.0), "bb": torch.zeros(2, 3, dtype=torch.uint8), "c": torch.zeros(0)},
    metadata={"k": "v"},
)


@settings(max_examples=400, deadline=None)
@given(
    cut=st.integers(0, len(VALID)),
    more=st.binary(max_size=4),
    edits=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4),
)
def test_what_the_library_refuses_we_refuse(cut, more, edits, tmp_path_factory):
    data = bytearray(VALID)
    for position, value in edits:
        data[position] = value
    data = bytes(data[: cut or None]) + more
    try:
        deserialize(data)
    except SafetensorError:
        path = tmp_path_factory.mktemp("edit") / "a.safetensors"
        path.write_bytes(data)
        with pytest.raises(FormatError):
            TensorFile(path)


def test_the_edits_above_start_from_a_file_that_both_accept(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(VALID)
    assert set(TensorFile(tmp_path / "a.safetensors").names) == set(load(VALID))
