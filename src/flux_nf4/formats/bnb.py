"""A quantised weight on disk, as bitsandbytes writes it, and in memory.

`X.weight` holds the packed codes; beside it travel `X.weight.absmax`, `.quant_map`, for nested
statistics `.nested_absmax` and `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4`: a JSON
text as bytes, which alone says the shape. Written byte for byte as bitsandbytes 0.50.2 does.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from flux_nf4.errors import FormatError, InputError
from flux_nf4.formats.keymap import MAX_STATE_BYTES, STATE_PREFIX, STATE_SUFFIXES
from flux_nf4.formats.strictjson import parse_json
from flux_nf4.nf4.codec import (
    BLOCK_SIZES,
    NESTED_BLOCK_SIZE,
    NestedAbsmax,
    NF4Weight,
    levels,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_KEYS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_KEYS = ("nested_blocksize", "nested_dtype", "nested_offset")
# Readers, bitsandbytes' kernels included, decode with their own table: a map that says something
# else would be silently ignored, so it is refused; the slack is bitsandbytes' own.
_MAP_SLACK = 1e-6


def weight_from_tensors(name: str, codes: Tensor, companions: Mapping[str, Tensor]) -> NF4Weight:
    """Put a weight together from its packed codes and its companions (suffix -> tensor).

    Reads the small tensors only: absmax and codes stay untouched on the disk.

    Raises:
        FormatError: a companion is missing, unexpected, or contradicts another.
    """
    state_suffix, state = _read_state(name, companions)
    is_nested = "nested_blocksize" in state
    expected = {"absmax", "quant_map", state_suffix}
    if is_nested:
        expected |= {"nested_absmax", "nested_quant_map"}
    if companions.keys() != expected:
        raise FormatError(
            f"quantised weight `{name}` must have the companions {sorted(expected)}, "
            f"got {sorted(companions)}"
        )
    num_values = math.prod(state["shape"])
    block_size = state["blocksize"]
    _check(name, codes, torch.uint8, (num_values // 2, 1))
    num_blocks = num_values // block_size
    absmax_dtype = torch.uint8 if is_nested else torch.float32
    absmax = companions["absmax"]
    _check(f"{name}.absmax", absmax, absmax_dtype, (num_blocks,))
    _check_map(f"{name}.quant_map", companions["quant_map"], levels(state["quant_type"]))
    return NF4Weight(
        codes=codes.view(-1),
        absmax=_nested(name, absmax, companions, state) if is_nested else absmax,
        shape=(state["shape"][0], state["shape"][1]),
        block_size=block_size,
        quant_type=state["quant_type"],
        dtype=_DTYPES[state["dtype"]],
    )


def _nested(
    name: str, codes: Tensor, companions: Mapping[str, Tensor], state: Mapping[str, Any]
) -> NestedAbsmax:
    absmax, nested_map = companions["nested_absmax"], companions["nested_quant_map"]
    num_nested_blocks = -(-codes.numel() // NESTED_BLOCK_SIZE)
    _check(f"{name}.nested_absmax", absmax, torch.float32, (num_nested_blocks,))
    _check(f"{name}.nested_quant_map", nested_map, torch.float32, (256,))
    if not torch.isfinite(nested_map).all():
        raise FormatError(f"`{name}.nested_quant_map` holds NaN or infinity")
    return NestedAbsmax(
        codes=codes,
        absmax=absmax,
        levels=nested_map,
        offset=float(state["nested_offset"]),
        block_size=NESTED_BLOCK_SIZE,
    )


def _read_state(name: str, companions: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    suffixes = [suffix for suffix in STATE_SUFFIXES if suffix in companions]
    if len(suffixes) != 1:
        raise FormatError(
            f"quantised weight `{name}` must have exactly one `{STATE_PREFIX}nf4` or "
            f"`{STATE_PREFIX}fp4`, got {sorted(companions)}"
        )
    suffix = suffixes[0]
    what = f"`{name}.{suffix}`"
    packed = companions[suffix]
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() > MAX_STATE_BYTES:
        raise FormatError(f"{what} must be at most {MAX_STATE_BYTES} uint8 of JSON")
    state = parse_json(packed.numpy().tobytes(), what)
    keys = set(state) if isinstance(state, dict) else None
    if keys not in (set(_KEYS), {*_KEYS, *_NESTED_KEYS}):
        raise FormatError(f"{what} must hold {', '.join(_KEYS)}, got {state!r:.200}")
    problem = _state_problem(state, suffix.removeprefix(STATE_PREFIX))
    if problem:
        raise FormatError(f"{what} has the wrong {problem}")
    return suffix, state


def _state_problem(state: Mapping[str, Any], quant_type: str) -> str | None:
    shape, block_size, dtype = state["shape"], state["blocksize"], state["dtype"]
    checks = {
        "quant_type": state["quant_type"] == quant_type,
        "blocksize": type(block_size) is int and block_size in BLOCK_SIZES,
        "dtype": isinstance(dtype, str) and dtype in _DTYPES,
        "shape": _is_matrix(shape),
    }
    if "nested_blocksize" in state:
        size, offset = state["nested_blocksize"], state["nested_offset"]
        checks["nested_blocksize"] = type(size) is int and size == NESTED_BLOCK_SIZE
        checks["nested_dtype"] = state["nested_dtype"] == "float32"
        checks["nested_offset"] = type(offset) in (int, float) and abs(offset) < 3.4e38
    for key, is_good in checks.items():
        if not is_good:
            return f"{key} {state[key]!r:.80}"
    if math.prod(shape) % block_size:
        return f"shape {shape}: it does not fill blocks of {block_size}"
    return None


def _is_matrix(shape: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(size) is int and 0 < size < 2**31 for size in shape)
    )


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise FormatError(
            f"`{name}` must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
        )


def _check_map(name: str, found: Tensor, known: Tensor) -> None:
    _check(name, found, torch.float32, (16,))
    # Written so that NaN, which compares as false, is refused.
    if not bool(((found - known).abs() <= _MAP_SLACK).all()):
        raise FormatError(
            f"`{name}` is not the table of its kind: {found.tolist()}",
            hint="this file was made with another table; quantise the original weights anew",
        )


def check_absmax_is_finite(name: str, weight: NF4Weight) -> None:
    """Read the absmax of a weight and check it: done while loading, as it touches every page.

    Raises:
        FormatError: it holds NaN or infinity, so the weight would.
    """
    absmax = weight.absmax
    check_is_finite(name, absmax.absmax if isinstance(absmax, NestedAbsmax) else absmax)


def check_is_finite(name: str, absmax: Tensor) -> None:
    """Raises FormatError where the absmax of the weight `name` holds NaN or infinity."""
    # A sum takes a thirtieth of the time; what is not finite makes it so, and it may overflow.
    if not torch.isfinite(absmax.float().sum()) and not torch.isfinite(absmax).all():
        raise FormatError(
            f"the absmax of `{name}` holds NaN or infinity", hint="the file is damaged: get it anew"
        )


def state_bytes(weight: NF4Weight) -> bytes:
    """The JSON text of a weight, to the byte as bitsandbytes writes it."""
    values: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    if isinstance(weight.absmax, NestedAbsmax):
        values["nested_blocksize"] = weight.absmax.block_size
        values["nested_dtype"] = "float32"
        values["nested_offset"] = weight.absmax.offset
    return json.dumps(values).encode()


def tensors_from_weight(name: str, weight: NF4Weight) -> dict[str, Tensor]:
    """The tensors that stand for a weight on disk, under their full names.

    Raises:
        InputError: the nested block size is not the one that the format has.
    """
    state = torch.frombuffer(bytearray(state_bytes(weight)), dtype=torch.uint8)
    tensors = {
        name: weight.codes.view(-1, 1),
        f"{name}.quant_map": levels(weight.quant_type),
        f"{name}.{STATE_PREFIX}{weight.quant_type}": state,
    }
    absmax = weight.absmax
    if isinstance(absmax, NestedAbsmax):
        if absmax.block_size != NESTED_BLOCK_SIZE:
            raise InputError(f"nested blocks must be {NESTED_BLOCK_SIZE}, got {absmax.block_size}")
        tensors[f"{name}.absmax"] = absmax.codes
        tensors[f"{name}.nested_absmax"] = absmax.absmax
        tensors[f"{name}.nested_quant_map"] = absmax.levels
    else:
        tensors[f"{name}.absmax"] = absmax
    return tensors
