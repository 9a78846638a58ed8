"""The NF4 format in memory: its tables, and one quantised matrix exactly as it is on disk.

Pure data. Nothing here quantises; the only arithmetic is that which moves a matrix between its
own forms without changing what it decodes to: slicing rows, joining rows, and un-nesting absmax.

Tables are facts of bitsandbytes 0.50.2, whose files we read and write.

Shape letters, in this module only:
    N  out features     G  blocks, N*K / block_size
    K  in features      P  bytes, N*K / 2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from flux_nf4.errors import InputError, ShapeError

QuantType = Literal["nf4", "fp4"]

BLOCK_SIZES = (64, 128)
NESTED_BLOCK_SIZE = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Quantiles of the normal distribution, scaled to [-1, 1] (QLoRA, arXiv 2305.14314, appendix E);
# the digits are those of the float32 values.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# One sign bit above three bits of magnitude: 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6 and 1/4 in float32.
# Both zeros are positive, as bitsandbytes writes them.
_FP4_MAGNITUDES = (
    0.0,
    0.0052083334885537624,
    0.6666666865348816,
    1.0,
    0.3333333432674408,
    0.5,
    0.1666666716337204,
    0.25,
)
FP4_LEVELS = (*_FP4_MAGNITUDES, *(0.0 - magnitude for magnitude in _FP4_MAGNITUDES))
_LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}


def levels(quant_type: str) -> Tensor:
    """The sixteen values that codes 0 to 15 stand for.

    () -> (16,) float32, on the CPU.

    Raises:
        InputError: `quant_type` is neither `nf4` nor `fp4`.
    """
    check_quant_type(quant_type)
    return torch.tensor(_LEVELS[quant_type], dtype=torch.float32, device="cpu")


@cache
def _dynamic_map_values() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for exponent_bits in range(7):
        # Fewer bits spent on the exponent leave more for the fraction: 1, 2, 4 ... 64 cells
        # between 0.1 and 1, each standing for its middle, one decade lower each time.
        edges = torch.linspace(0.1, 1, 2**exponent_bits + 1, dtype=torch.float32, device="cpu")
        middles = 10 ** (exponent_bits - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist()
        values += (-middles).tolist()
    return tuple(sorted(values))


def dynamic_map() -> Tensor:
    """The signed dynamic 8-bit map, in rising order (arXiv 1511.04561).

    () -> (256,) float32, on the CPU. It has 1 but not -1: the lowest is -0.99296875.
    """
    return torch.tensor(_dynamic_map_values(), dtype=torch.float32, device="cpu")


def check_quant_type(quant_type: str) -> None:
    """Raises InputError unless `quant_type` is one that this package knows."""
    if quant_type not in get_args(QuantType):
        raise InputError(f"quant_type must be `nf4` or `fp4`, got {quant_type!r}")


def check_block_size(block_size: int) -> None:
    """Raises InputError unless `block_size` is one that this package knows."""
    if block_size not in BLOCK_SIZES:
        raise InputError(f"block_size must be 64 or 128, got {block_size}")


def check_fills_blocks(shape: Sequence[int], block_size: int) -> None:
    """Raises ShapeError unless `shape` is a matrix whose values fill whole blocks."""
    if len(shape) != 2:
        raise ShapeError(f"a weight must have two dimensions, got {len(shape)}: {tuple(shape)}")
    num_values = shape[0] * shape[1]
    if shape[0] < 1 or shape[1] < 1:
        raise ShapeError(f"a weight of {shape[0]} x {shape[1]} holds no values")
    if num_values % block_size:
        raise ShapeError(
            f"a weight of {shape[0]} x {shape[1]} does not fill blocks of {block_size}",
            hint="leave this layer unquantised, as every layer of FLUX does fill its blocks",
        )


def _check_tensor(name: str, tensor: Tensor, length: int, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise InputError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != (length,):
        raise ShapeError(f"{name} must have shape ({length},), got {tuple(tensor.shape)}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NestedAbsmax:
    """The absmax of every block, quantised once more to 8 bits: the form called v1.

    codes (G,) uint8, absmax (ceil(G / 256),) float32, levels (256,) float32.
    `offset` is the mean that was subtracted before, a float32 value.

    Raises:
        ShapeError: the three tensors do not fit each other.
        InputError: one has another dtype, or lies on another device.
    """

    codes: Tensor
    absmax: Tensor
    levels: Tensor
    offset: float
    block_size: int = NESTED_BLOCK_SIZE

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise InputError(f"the nested block_size must be positive, got {self.block_size}")
        num_blocks = -(-self.codes.numel() // self.block_size)
        _check_tensor("nested codes", self.codes, self.codes.numel(), torch.uint8)
        _check_tensor("nested absmax", self.absmax, num_blocks, torch.float32)
        _check_tensor("nested levels", self.levels, 256, torch.float32)
        devices = {str(tensor.device) for tensor in (self.codes, self.absmax, self.levels)}
        if len(devices) > 1:
            raise InputError(f"one nested absmax lies on several devices: {sorted(devices)}")

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return self.codes.nbytes + self.absmax.nbytes + self.levels.nbytes

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> NestedAbsmax:
        """The same on another device."""
        return replace(
            self,
            codes=self.codes.to(device, non_blocking=non_blocking),
            absmax=self.absmax.to(device, non_blocking=non_blocking),
            levels=self.levels.to(device, non_blocking=non_blocking),
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes, absmax, levels, and the offset as a float32 tensor () beside them."""
        offset = torch.tensor(self.offset, dtype=torch.float32, device=self.codes.device)
        return self.codes, self.absmax, self.levels, offset

    def to_float(self) -> Tensor:
        """The absmax of every block, exactly as it decodes.

        () -> (G,) float32.
        """
        return decode_absmax(self.tensors(), self.block_size)


def decode_absmax(nested: Sequence[Tensor], block_size: int) -> Tensor:
    """Decode nested statistics: level x absmax, rounded to float32, then plus the offset.

    (codes (G,), absmax (ceil(G / block_size),), levels (256,), offset ()) -> (G,) float32.

    The two roundings are bitsandbytes': a fused multiply-add would differ in the last bit.
    """
    codes_G, absmax, levels, offset = nested
    scale_G = absmax.repeat_interleave(block_size)[: codes_G.numel()]
    return levels.index_select(0, codes_G.int()).mul_(scale_G).add_(offset)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NF4Weight:
    """One quantised matrix, exactly as it is on disk.

    codes (P,) uint8: two codes a byte, row-major, element 2j in the HIGH nibble.
    absmax (G,) float32 (v2), or nested (v1).
    `dtype` is what the weight was before, and what it computes in by default.

    Raises:
        ShapeError: the tensors do not have the sizes that `shape` and `block_size` ask for.
        InputError: an unknown dtype, block size or quant_type, or tensors on several devices.
    """

    codes: Tensor
    absmax: Tensor | NestedAbsmax
    shape: tuple[int, int]
    block_size: int = 64
    quant_type: QuantType = "nf4"
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        check_quant_type(self.quant_type)
        check_block_size(self.block_size)
        check_fills_blocks(self.shape, self.block_size)
        if self.dtype not in DTYPES:
            raise InputError(f"a weight computes in bfloat16, float16 or float32, not {self.dtype}")
        num_values = self.shape[0] * self.shape[1]
        num_blocks = num_values // self.block_size
        _check_tensor("codes", self.codes, num_values // 2, torch.uint8)
        if isinstance(self.absmax, NestedAbsmax):
            _check_tensor("nested codes", self.absmax.codes, num_blocks, torch.uint8)
            absmax_device = self.absmax.codes.device
        else:
            _check_tensor("absmax", self.absmax, num_blocks, torch.float32)
            absmax_device = self.absmax.device
        if absmax_device != self.codes.device:
            raise InputError(f"codes lie on {self.codes.device}, absmax on {absmax_device}")

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and statistics."""
        absmax = self.absmax
        absmax_bytes = absmax.num_bytes if isinstance(absmax, NestedAbsmax) else absmax.nbytes
        return self.codes.nbytes + absmax_bytes

    @property
    def is_nested(self) -> bool:
        """Whether absmax is itself quantised (v1)."""
        return isinstance(self.absmax, NestedAbsmax)

    @property
    def device(self) -> torch.device:
        """Where the codes lie."""
        return self.codes.device

    def float_absmax(self) -> Tensor:
        """The absmax of every block, un-nested where it is nested.

        () -> (G,) float32.
        """
        return self.absmax.to_float() if isinstance(self.absmax, NestedAbsmax) else self.absmax

    def with_float_absmax(self) -> NF4Weight:
        """The same weight as v2; it decodes to the same values, bit for bit."""
        return replace(self, absmax=self.float_absmax())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> NF4Weight:
        """The same weight on another device."""
        return replace(
            self,
            codes=self.codes.to(device, non_blocking=non_blocking),
            absmax=self.absmax.to(device, non_blocking=non_blocking),
        )

    def rows(self, start: int, stop: int) -> NF4Weight:
        """Output rows `start` to `stop`, exact; un-nested where nested, else views.

        (N, K) -> (stop - start, K).

        Raises:
            InputError: the range is empty or leaves the matrix.
            ShapeError: rows do not end where blocks do.
        """
        num_out, num_in = self.shape
        if not 0 <= start < stop <= num_out:
            raise InputError(f"rows {start} to {stop} are not within 0 to {num_out}")
        if num_in % self.block_size:
            raise ShapeError(
                f"rows of {num_in} values do not end where blocks of {self.block_size} do"
            )
        blocks_per_row = num_in // self.block_size
        return replace(
            self,
            codes=self.codes[start * num_in // 2 : stop * num_in // 2],
            absmax=self.float_absmax()[start * blocks_per_row : stop * blocks_per_row],
            shape=(stop - start, num_in),
        )


def concatenate_rows(parts: Sequence[NF4Weight]) -> NF4Weight:
    """Join weights along their output rows, exact; nested ones are un-nested first.

    [(N_1, K), (N_2, K) ...] -> (N_1 + N_2 + ..., K).

    Raises:
        InputError: no parts, or parts that differ in block size, quant_type or dtype.
        ShapeError: parts that differ in K.
    """
    if not parts:
        raise InputError("there are no parts to concatenate")
    first = parts[0]
    widths = sorted({part.shape[1] for part in parts})
    if len(widths) > 1:
        raise ShapeError(f"parts have rows of different lengths: {widths}")
    kinds = {(part.block_size, part.quant_type, str(part.dtype)) for part in parts}
    if len(kinds) > 1:
        raise InputError(
            f"parts differ in block size, quant_type or dtype: {sorted(kinds)}",
            hint="quantise the parts in the same way",
        )
    if len(parts) == 1:
        return first.with_float_absmax()
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        absmax=torch.cat([part.float_absmax() for part in parts]),
        shape=(sum(part.shape[0] for part in parts), first.shape[1]),
    )
