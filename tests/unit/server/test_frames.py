import asyncio
import io
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_nf4.errors import FormatError
from flux_nf4.server.frames import (
    MAX_FRAME_BYTES,
    make_shared_memory,
    pack_frame,
    put_shared,
    read_frame,
    receive_frame,
    take_shared,
)

FRAME = {"kind": "step", "job": "job_1", "text": "grün \U0001f600"}


@pytest.fixture
def shared():
    descriptor = make_shared_memory()
    yield descriptor
    os.close(descriptor)


def receive(data):
    async def read():
        stream = asyncio.StreamReader()
        stream.feed_data(data)
        stream.feed_eof()
        return await receive_frame(stream)

    return asyncio.run(read())


def test_a_worker_reads_what_the_parent_wrote():
    assert read_frame(io.BytesIO(pack_frame(FRAME))) == FRAME


def test_the_parent_reads_what_a_worker_wrote():
    assert receive(pack_frame(FRAME)) == FRAME


@pytest.mark.parametrize("length", [0, 3, 10])
def test_a_worker_without_a_parent_reads_none(length):
    assert read_frame(io.BytesIO(pack_frame(FRAME)[:length])) is None


@pytest.mark.parametrize("length", [0, 3, 10])
def test_the_end_of_a_worker_is_the_end_of_the_stream(length):
    with pytest.raises(EOFError):
        receive(pack_frame(FRAME)[:length])


def test_a_length_beyond_measure_is_refused_before_it_is_read():
    with pytest.raises(FormatError, match=str(MAX_FRAME_BYTES)):
        receive(b"Loading checkpoint shards")


@given(st.binary(max_size=60))
def test_any_bytes_are_a_frame_or_refused(body):
    data = len(body).to_bytes(4, "big") + body
    try:
        frame = read_frame(io.BytesIO(data))
    except FormatError:
        return
    assert isinstance(frame["kind"], str)


def test_two_prompts_of_the_greatest_length_fit():
    texts = {"prompt": "\U0001f600" * 100_000, "negative_prompt": "\x01" * 100_000}

    assert len(pack_frame({"kind": "job", "spec": texts})) < MAX_FRAME_BYTES


def test_parts_lie_one_after_the_other(shared):
    put_shared(shared, [b"abc", b"", b"defg"])

    assert (take_shared(shared, 3), take_shared(shared, 4, 3)) == (b"abc", b"defg")


def test_what_is_not_there_cannot_be_taken(shared):
    put_shared(shared, [b"abc"])

    with pytest.raises(FormatError, match="3 of 5 bytes"):
        take_shared(shared, 5)


def test_the_memory_has_no_name(shared):
    assert os.fstat(shared).st_nlink == 0
