"""What a worker and its parent say to each other: JSON in frames, pixels in shared memory.

A frame is four bytes of length, big end first, and a JSON object with a `kind`. The shared memory
is a file without a name (`memfd`, or one that is unlinked already) which the worker inherits: when
both processes are gone, however they went, so is the memory. It holds one message at a time; who
wrote it waits for the other's word before it writes again.
"""

from __future__ import annotations

import json
import os
import tempfile
from typing import IO, TYPE_CHECKING, Any

from flux_nf4 import errors
from flux_nf4.errors import FluxNF4Error, FormatError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

MAX_FRAME_BYTES = 4 * 2**20  # two prompts of 100,000 characters, each escaped, are 2.4 MB
_LENGTH_BYTES = 4


def pack_frame(frame: dict[str, Any]) -> bytes:
    """A frame's bytes."""
    body = json.dumps(frame).encode()
    assert len(body) <= MAX_FRAME_BYTES
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


async def receive_frame(stream: asyncio.StreamReader) -> dict[str, Any]:
    """Wait for a frame of a worker's.

    Raises:
        EOFError: the stream has ended, in the middle of a frame or before it.
        FormatError: what came is no frame.
    """
    length = _length(await stream.readexactly(_LENGTH_BYTES))
    return _parse(await stream.readexactly(length))


def read_frame(stream: IO[bytes]) -> dict[str, Any] | None:
    """Wait for a frame of the parent's; None when the parent has closed the stream.

    Raises:
        FormatError: what came is no frame.
    """
    head = stream.read(_LENGTH_BYTES)
    if len(head) < _LENGTH_BYTES:
        return None
    length = _length(head)
    body = stream.read(length)
    return _parse(body) if len(body) == length else None


def _length(head: bytes) -> int:
    length = int.from_bytes(head, "big")
    if length > MAX_FRAME_BYTES:
        raise FormatError(f"a frame of {length} bytes is longer than {MAX_FRAME_BYTES}")
    return length


def _parse(body: bytes) -> dict[str, Any]:
    try:
        frame = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"a frame is not JSON: {error}") from error
    if not isinstance(frame, dict) or not isinstance(frame.get("kind"), str):
        raise FormatError("a frame is not an object with a `kind`")
    return frame


def error_from(fields: dict[str, Any]) -> FluxNF4Error:
    """One of our errors as a worker told it: `message`, `hint`, and its `class`."""
    kind = getattr(errors, str(fields.get("class")), FluxNF4Error)
    error = kind(str(fields["message"]), hint=fields.get("hint"))
    assert isinstance(error, FluxNF4Error)
    return error


def make_shared_memory() -> int:
    """The descriptor of an empty, nameless file in memory, for a child process to inherit."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("flux-nf4 pixels")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def put_shared(descriptor: int, parts: Sequence[bytes]) -> None:
    """Write `parts` one after the other, in place of what was there."""
    offset = 0
    for part in parts:
        rest = memoryview(part)
        while rest:
            written = os.pwrite(descriptor, rest, offset)
            offset, rest = offset + written, rest[written:]


def take_shared(descriptor: int, size_bytes: int, offset: int = 0) -> bytes:
    """Copy bytes out.

    Raises:
        FormatError: there are fewer.
    """
    data = os.pread(descriptor, size_bytes, offset)
    if len(data) != size_bytes:
        raise FormatError(f"the shared memory holds {len(data)} of {size_bytes} bytes")
    return data
