"""The header of a safetensors file: what it may say, parsed and planned without any file.

A safetensors file is eight bytes (the header's length, little-endian), the header (a JSON
object: name -> dtype, shape, data_offsets), and the data. The safetensors library checks most of
that; this parser also refuses what the library lets through: doubled names, unknown keys inside
an entry, spaces before the header, names that are paths or hold control characters.
Its limits are lower than the library's (100 MB of header): no FLUX file reaches a fiftieth.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flux_nf4.errors import FormatError
from flux_nf4.formats.strictjson import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 25_000_000
MAX_NUM_TENSORS = 20_000
MAX_NUM_AXES = 8
MAX_NAME_LENGTH = 512
MAX_DATA_BYTES = 2**62  # far above any disk, far below an overflow inside torch

# In the order in which the safetensors library lays tensors out (0.8, `Dtype`, descending):
# the widest first, so that every tensor is aligned to its own item size. Name -> bytes of an item.
DTYPE_BYTES: dict[str, int] = {
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
    **dict.fromkeys(("F32", "U32", "I32"), 4),
    **dict.fromkeys(("BF16", "F16", "U16", "I16"), 2),
    **dict.fromkeys(("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}
_DTYPE_ORDER = {name: order for order, name in enumerate(DTYPE_BYTES)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies: bytes `start` to `stop`, counted from the end of the header."""

    name: str
    dtype_name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        # Not at the top: headers are read, and told of, where nobody needs torch.
        from flux_nf4.formats.dtypes import DTYPES

        return DTYPES[self.dtype_name]

    @property
    def num_bytes(self) -> int:
        """How long the data is."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A parsed header: `infos` in the order of the data."""

    infos: dict[str, TensorInfo]
    metadata: dict[str, str]

    @property
    def data_bytes(self) -> int:
        """How long the data behind the header is."""
        return max((info.stop for info in self.infos.values()), default=0)


def parse_header(data: bytes) -> Header:
    """Parse the JSON of a header and check everything that needs no file.

    Raises:
        FormatError: anything but a well-formed header whose tensors fill the data without
            holes or overlaps.
    """
    if not data.startswith(b"{"):
        raise FormatError(f"the header must begin with `{{`, got {data[:8]!r}")
    values = parse_json(data, "the header")
    metadata = _parse_metadata(values.pop("__metadata__", {}))
    if len(values) > MAX_NUM_TENSORS:
        raise FormatError(f"the header lists {len(values)} tensors; at most {MAX_NUM_TENSORS}")
    infos = sorted(
        (_parse_entry(name, entry) for name, entry in values.items()),
        key=lambda info: (info.start, info.stop),
    )
    position = 0
    for info in infos:
        if info.start != position:
            what = "overlaps the tensor before it" if info.start < position else "leaves a hole"
            raise FormatError(f"tensor `{info.name}` begins at byte {info.start} and {what}")
        position = info.stop
    return Header(infos={info.name: info for info in infos}, metadata=metadata)


def _parse_metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FormatError("`__metadata__` must hold strings only")
    for text in (*value.keys(), *value.values()):
        if not _is_unicode(text):
            raise FormatError(f"`__metadata__` holds text that is not Unicode: {text!r:.80}")
    return value


def _is_unicode(text: str) -> bool:
    # JSON can spell half a surrogate pair, which no output stream can encode.
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _check_name(name: str) -> None:
    parts = name.split("/")
    if (
        not 0 < len(name) <= MAX_NAME_LENGTH
        or not name.isprintable()
        or "\\" in name
        or parts[0] == ""
        or ".." in parts
    ):
        raise FormatError(f"{name!r:.80} is no name for a tensor")


def _parse_entry(name: str, entry: Any) -> TensorInfo:
    _check_name(name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(
            f"tensor `{name}` must have `dtype`, `shape` and `data_offsets`, got {entry!r:.80}"
        )
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    item_bytes = DTYPE_BYTES.get(dtype_name) if isinstance(dtype_name, str) else None
    if item_bytes is None:
        raise FormatError(
            f"tensor `{name}` has the unknown dtype {dtype_name!r:.40}",
            hint=f"known are {', '.join(DTYPE_BYTES)}",
        )
    if not _is_list_of_sizes(shape) or len(shape) > MAX_NUM_AXES:
        raise FormatError(f"tensor `{name}` has the impossible shape {shape!r:.80}")
    if not _is_list_of_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"tensor `{name}` has the impossible data_offsets {offsets!r:.80}")
    # An axis of length 0 must not hide the size of the others: torch multiplies them for strides.
    if math.prod(max(size, 1) for size in shape) * item_bytes > MAX_DATA_BYTES:
        raise FormatError(f"tensor `{name}` has the impossible shape {shape!r:.80}")
    num_bytes = math.prod(shape) * item_bytes
    if offsets[1] - offsets[0] != num_bytes:
        raise FormatError(
            f"tensor `{name}` of {dtype_name} {shape} needs {num_bytes} bytes, "
            f"but its data_offsets span {offsets[1] - offsets[0]}"
        )
    return TensorInfo(
        name=name,
        dtype_name=dtype_name,
        shape=tuple(shape),
        start=offsets[0],
        stop=offsets[1],
    )


def _is_list_of_sizes(value: Any) -> bool:
    # `type` and not isinstance: JSON's true is an int to Python.
    return isinstance(value, list) and all(
        type(size) is int and 0 <= size <= MAX_DATA_BYTES for size in value
    )


def plan_header(
    specs: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> Header:
    """Lay tensors out as the safetensors library does: by dtype, the widest first, then by name.

    Raises:
        FormatError: a name, a dtype or a metadata entry that a reader would refuse.
    """
    from flux_nf4.formats.dtypes import DTYPE_NAMES

    named: list[tuple[int, bytes, str, str, tuple[int, ...]]] = []
    for name, dtype, shape in specs:
        _check_name(name)
        dtype_name = DTYPE_NAMES.get(dtype)
        if dtype_name is None or name == "__metadata__":
            raise FormatError(f"tensor `{name}` of {dtype} cannot be written to safetensors")
        named.append((_DTYPE_ORDER[dtype_name], name.encode(), name, dtype_name, tuple(shape)))
    infos: dict[str, TensorInfo] = {}
    position = 0
    for _, _, name, dtype_name, shape in sorted(named):
        if name in infos:
            raise FormatError(f"tensor `{name}` is given twice")
        stop = position + math.prod(shape) * DTYPE_BYTES[dtype_name]
        infos[name] = TensorInfo(
            name=name, dtype_name=dtype_name, shape=shape, start=position, stop=stop
        )
        position = stop
    return Header(infos=infos, metadata=_parse_metadata(dict(metadata or {})))


def encode_header(header: Header) -> bytes:
    """The bytes before the data: length and compact JSON, padded with spaces to eight bytes."""
    values: dict[str, Any] = {}
    if header.metadata:
        values["__metadata__"] = dict(sorted(header.metadata.items()))
    for info in header.infos.values():
        values[info.name] = {
            "dtype": info.dtype_name,
            "shape": list(info.shape),
            "data_offsets": [info.start, info.stop],
        }
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
