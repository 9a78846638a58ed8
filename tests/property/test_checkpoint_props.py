"""A checkpoint that somebody tampered with opens, or is refused by one of our own errors."""

import json
import struct

import pytest
from checkpoints import quantized, save_transformer_only
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_nf4.errors import FluxNF4Error
from flux_nf4.formats.checkpoint import Checkpoint, open_checkpoint
from flux_nf4.formats.keymap import transformer_table


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tiny quantised transformer as a file: its header and its data."""
    import torch

    entries = {
        name: torch.ones(64, 64) if name.endswith(".weight") else torch.ones(64)
        for name in transformer_table(1, 1, "bfl").names
    }
    path = tmp_path_factory.mktemp("small") / "a.safetensors"
    save_transformer_only(path, quantized(entries, nested=True))
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def outcome(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    try:
        checkpoint = open_checkpoint(path)
    except FluxNF4Error as error:
        return error
    # What opens can be read whole.
    for component in checkpoint.components.values():
        assert len([component.entries[name] for name in component.entries])
    return checkpoint


def test_the_file_that_is_tampered_with_opens(small, tmp_path):
    assert isinstance(outcome(tmp_path / "a.safetensors", *small), Checkpoint)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_tampering_with_names_shapes_and_dtypes_ends_well(small, tmp_path_factory, data):
    header, content = dict(small[0]), small[1]
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(header)))
        entry = dict(header.pop(name))
        new_name = data.draw(st.sampled_from(sorted(header)) | st.just(name) | st.text(max_size=8))
        change = data.draw(st.sampled_from(["dtype", "shape", "nothing"]))
        if change == "dtype":
            entry["dtype"] = data.draw(st.sampled_from(["F32", "U8", "I8", "F8_E4M3", "I32"]))
        elif change == "shape":
            entry["shape"] = data.draw(st.permutations(entry["shape"]) | st.just([]))
        header[new_name] = entry
    path = tmp_path_factory.mktemp("tampered") / "a.safetensors"
    assert isinstance(outcome(path, header, content), Checkpoint | FluxNF4Error)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_tampering_with_the_small_texts_ends_well(small, tmp_path_factory, data):
    header, content = small[0], bytearray(small[1])
    states = [entry for name, entry in header.items() if "quant_state" in name]
    start, stop = data.draw(st.sampled_from(states))["data_offsets"]
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(start, stop - 1))
        content[position] = data.draw(
            st.sampled_from(b'0123456789",{}:[]-.eE nf') | st.integers(0, 255)
        )
    path = tmp_path_factory.mktemp("texts") / "a.safetensors"
    assert isinstance(outcome(path, header, bytes(content)), Checkpoint | FluxNF4Error)
