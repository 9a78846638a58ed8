"""Any bytes at all are a tensor file or a FormatError, and never anything else."""

import json
import struct

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tensor_files import write_tensor_file

from flux_nf4.errors import FormatError
from flux_nf4.formats.facts import METADATA_KEY, Facts
from flux_nf4.formats.tensorfile import TensorFile

FAST = settings(max_examples=300, deadline=None)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True)
    | st.text(max_size=5)
    | st.sampled_from(["F32", "U8", "BF16", "F8_E4M3", "F4"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
SIZES = st.integers(-2, 12) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 0.5, True, None])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "BOOL", "F4", "f32", 3, None]),
        "shape": st.lists(SIZES, max_size=3),
        "data_offsets": st.lists(SIZES, min_size=1, max_size=3),
    }
)
HEADERS = st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), ENTRIES | JSON, max_size=4)


def read_all(path, data):
    """Every tensor of the file, or None where it is refused in the one right way."""
    path.write_bytes(data)
    try:
        file = TensorFile(path)
    except FormatError:
        return None
    return {name: file.tensor(name).clone() for name in file.names}


def accounted(tensors, data):
    """Whether a file is refused, or its tensors are exactly the bytes behind its header."""
    if tensors is None:
        return True
    header_bytes = struct.unpack("<Q", data[:8])[0]
    return sum(tensor.nbytes for tensor in tensors.values()) == len(data) - 8 - header_bytes


@FAST
@given(data=st.binary(max_size=64))
def test_any_bytes_are_a_file_or_a_format_error(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "a.safetensors"
    assert accounted(read_all(path, data), data)


@FAST
@given(header=HEADERS | JSON, data=st.binary(max_size=16), slack=st.integers(-2, 2))
@example(header={}, data=b"", slack=0)
def test_any_header_is_a_file_or_a_format_error(header, data, slack, tmp_path_factory):
    text = json.dumps(header).encode()
    data = struct.pack("<Q", max(0, len(text) + slack)) + text + data
    path = tmp_path_factory.mktemp("header") / "a.safetensors"
    assert accounted(read_all(path, data), data)


@FAST
@given(st.data())
def test_any_damage_to_a_good_file_is_a_file_or_a_format_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damage") / "a.safetensors"
    tensors = {"a": torch.arange(4.0), "b.weight": torch.zeros(2, 3, dtype=torch.bfloat16)}
    write_tensor_file(path, tensors, metadata={"k": "v"})
    good = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(good)))
        removed = data.draw(st.integers(0, 3))
        good[position : position + removed] = data.draw(st.binary(max_size=3))
    assert accounted(read_all(path, bytes(good)), bytes(good))


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.dictionaries(
        st.text("abc._0", max_size=6).map("x{}".format),
        st.lists(st.integers(0, 4), max_size=3),
        max_size=5,
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn]),
)
def test_what_is_written_reads_back(shapes, dtype, tmp_path_factory):
    path = tmp_path_factory.mktemp("round") / "a.safetensors"
    tensors = {name: torch.ones(shape).to(dtype) for name, shape in shapes.items()}
    write_tensor_file(path, tensors)
    file = TensorFile(path)
    assert file.infos.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(file.tensor(name).float(), tensor.float())
        assert file.tensor(name).shape == tensor.shape


@FAST
@given(text=st.text(max_size=30) | JSON.map(json.dumps))
def test_any_metadata_is_facts_or_a_format_error(text):
    try:
        facts = Facts.from_metadata({METADATA_KEY: text})
    except FormatError:
        return
    assert isinstance(facts, Facts)
