"""Quantise matrices on every processor, or on a GPU; no bit depends on how they are cut up."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from flux_nf4.errors import FormatError, InputError
from flux_nf4.nf4 import ops
from flux_nf4.nf4.codec import NestedAbsmax, NF4Weight
from flux_nf4.nf4.reference import nest_absmax
from flux_nf4.nf4.search import quantize_searched
from flux_nf4.pipeline.convert import widened
from flux_nf4.pipeline.load import resolve_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flux_nf4.formats.component import Entry
    from flux_nf4.pipeline.quantization_report import ErrorReport

_CHUNK = 2**22  # values of a matrix that a thread takes at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationSettings:
    """How a checkpoint is quantised; `v1` quantises absmax once more, to 8 bits.

    `scale` is how the scale of a block is chosen: `absmax`, as bitsandbytes does, or `search`, for
    the least squared error. `t5` is stored in fp8, as other all-in-one files have it, or kept.
    """

    format: Literal["v2", "v1"] = "v2"
    layout: Literal["all-in-one", "transformer-only", "diffusers"] = "all-in-one"
    block_size: int = 64
    scale: Literal["absmax", "search"] = "absmax"
    t5: Literal["fp8", "keep"] = "fp8"
    device: str = "auto"


class ParallelQuantizer:
    """Quantises matrices chunk by chunk on the threads of `pool`, or whole on a GPU.

    `on_outline` hears of matrices that were read to lay out the result: of their bytes. The report
    has the layers in the order in which they were outlined.
    """

    def __init__(
        self,
        settings: QuantizationSettings,
        pool: ThreadPoolExecutor,
        *,
        report: ErrorReport | None = None,
        on_outline: Callable[[int], None] = lambda _num_bytes: None,
    ) -> None:
        self.device = resolve_device(settings.device)
        self._settings = settings
        self._pool = pool
        self._report = report
        self._report_lock = threading.Lock()
        self._on_outline = on_outline
        self._names: list[str] = []

    def quantize(self, name: str, matrix: Tensor) -> NF4Weight:
        """The matrix, quantised; its error goes into the report.

        Raises:
            FormatError: it holds NaN or infinity.
        """
        weight = self._quantize(name, matrix)
        if self._report is not None:
            with self._report_lock:
                # Where the disk lost a weight it is made again, and is still one layer.
                if name not in {layer.name for layer in self._report.layers}:
                    self._report.add(name, matrix, weight)
                    self._report.layers.sort(key=lambda layer: self._names.index(layer.name))
        return weight

    def outline(self, name: str, matrix: Tensor, read: Callable[[], Entry]) -> NF4Weight:
        """What `quantize` would make of a meta tensor, on the meta device."""
        self._names.append(name)
        block_size, (num_out, num_in) = self._settings.block_size, matrix.shape
        absmax: Tensor | NestedAbsmax = matrix.new_empty(
            matrix.numel() // block_size, dtype=torch.float32
        )
        if self._settings.format == "v1":
            values = read()
            assert isinstance(values, Tensor)
            nested = self._quantize(name, values).absmax
            assert isinstance(nested, NestedAbsmax)
            self._on_outline(values.nbytes)
            absmax = nested.to("meta")
        return NF4Weight(
            codes=matrix.new_empty(matrix.numel() // 2, dtype=torch.uint8),
            absmax=absmax,
            shape=(num_out, num_in),
            block_size=block_size,
            dtype=widened(matrix.dtype),
        )

    def _quantize(self, name: str, matrix: Tensor) -> NF4Weight:
        settings = self._settings
        blocks = matrix.reshape(-1, settings.block_size)
        if self.device.type == "cpu":
            chunks = blocks.split(_CHUNK // settings.block_size)
        else:
            chunks = (blocks,)
        try:
            parts = list(self._pool.map(self._quantize_chunk, chunks))
        except InputError as error:
            num_bad = matrix.numel() - int(matrix.float().isfinite().sum())  # in all chunks
            found = f"{num_bad} of {matrix.numel()} values are NaN or infinite in float32"
            raise FormatError(
                f"`{name}`: {found if num_bad else error.message}", hint=error.hint
            ) from error
        absmax_G = torch.cat([part.float_absmax() for part in parts])
        # The last bits of a mean depend on how many of PyTorch's threads share it: here, one.
        nested = self._pool.submit(nest_absmax, absmax_G) if settings.format == "v1" else None
        return NF4Weight(
            codes=torch.cat([part.codes for part in parts]),
            absmax=absmax_G if nested is None else nested.result(),
            shape=(matrix.shape[0], matrix.shape[1]),
            block_size=settings.block_size,
            dtype=parts[0].dtype,
        )

    def _quantize_chunk(self, blocks: Tensor) -> NF4Weight:
        settings = self._settings
        values = blocks.to(self.device).to(widened(blocks.dtype))
        if settings.scale == "search":
            # Nested statistics would lose by negative scales.
            signed = settings.format == "v2"
            return quantize_searched(values, block_size=settings.block_size, signed=signed).to(
                "cpu"
            )
        return ops.quantize(values, block_size=settings.block_size).to("cpu")


@contextlib.contextmanager
def one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """As many threads as PyTorch would use, each with one for itself.

    PyTorch's own wait for each other after every operation. On idle processors that costs a
    third; on busy ones, where four of them reached 4 million values a second, nearly everything.
    """
    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(
            num_threads, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            yield pool
    finally:
        torch.set_num_threads(num_threads)
