"""What quantising did to every layer: its error in figures, and as a picture.

Layers are added one at a time as they are quantised, and no more than figures is kept of them.
The error is that of the values which the codes stand for, in float32.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flux_nf4.errors import InputError
from flux_nf4.formats.atomic import atomic_file
from flux_nf4.pipeline.quantization_plot import HIGHEST, NUM_BINS, draw_report

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from flux_nf4.nf4.codec import NF4Weight

_CHUNK = 2**20  # values compared at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """How far the weights of one layer, or of all, are from what they were.

    `relative_rmse` is the norm of the error over the norm of the weights; `snr_db` says the same in
    decibels, and is None where there is no error. `bytes_after` counts codes and statistics.
    """

    name: str
    num_weights: int
    squared_error: float
    squared_weights: float
    max_abs_error: float
    bytes_before: int
    bytes_after: int

    @property
    def relative_rmse(self) -> float:
        """0 where there is no error."""
        return math.sqrt(self.squared_error / self.squared_weights) if self.squared_error else 0.0

    @property
    def snr_db(self) -> float | None:
        """None where there is no error."""
        return -20 * math.log10(self.relative_rmse) if self.squared_error else None

    def to_dict(self) -> dict[str, Any]:
        """As the report writes it."""
        figures = {"relative_rmse": self.relative_rmse, "snr_db": self.snr_db}
        return asdict(self) | figures


class ErrorReport:
    """The errors of a quantised transformer. `scale` is how scales were chosen."""

    def __init__(self, *, scale: str) -> None:
        self.scale = scale
        self.layers: list[LayerError] = []
        self._counts = [0] * NUM_BINS

    def add(self, name: str, original: Tensor, weight: NF4Weight) -> None:
        """Compare one layer with what it was."""
        import torch

        from flux_nf4.nf4 import reference

        values, absmax = original.detach().reshape(-1), weight.float_absmax()
        squared_error = squared_weights = max_abs_error = 0.0
        size = weight.block_size
        for start in range(0, values.numel(), _CHUNK):
            chunk = values[start : start + _CHUNK].float().view(-1, size)
            stop = start + chunk.numel()
            scale = absmax[start // size : stop // size]
            codes = weight.codes[start // 2 : stop // 2]
            layout = (tuple(chunk.shape), size, weight.quant_type, torch.float32)
            error = reference.expand(codes, scale, *layout) - chunk
            squared_error += float(error.square().sum(dtype=torch.float64))
            squared_weights += float(chunk.square().sum(dtype=torch.float64))
            max_abs_error = max(max_abs_error, float(error.abs().max()))
            relative = (chunk / scale[:, None]).nan_to_num(nan=0)
            bins = torch.histc(relative, bins=NUM_BINS, min=-HIGHEST, max=HIGHEST)
            self._counts = [a + int(b) for a, b in zip(self._counts, bins.tolist(), strict=True)]
        self.layers.append(
            LayerError(
                name=name,
                num_weights=values.numel(),
                squared_error=squared_error,
                squared_weights=squared_weights,
                max_abs_error=max_abs_error,
                bytes_before=original.nbytes,
                bytes_after=weight.num_bytes,
            )
        )

    @property
    def total(self) -> LayerError:
        """All layers as one."""
        return LayerError(
            name="total",
            num_weights=sum(each.num_weights for each in self.layers),
            squared_error=sum(each.squared_error for each in self.layers),
            squared_weights=sum(each.squared_weights for each in self.layers),
            max_abs_error=max((each.max_abs_error for each in self.layers), default=0.0),
            bytes_before=sum(each.bytes_before for each in self.layers),
            bytes_after=sum(each.bytes_after for each in self.layers),
        )

    def write_json(self, path: str | Path) -> None:
        """Write every figure; the file is there whole, or as it was before.

        Raises:
            DiskError: it could not be written.
            InputError: `path` is no file's.
        """
        values = {
            "scale": self.scale,
            "total": self.total.to_dict(),
            "layers": [each.to_dict() for each in self.layers],
        }
        with atomic_file(path) as file:
            file.write((json.dumps(values, indent=1) + "\n").encode())

    def plot(self, path: str | Path) -> None:
        """Draw the error of every layer, and the sixteen levels over the weights, as SVG.

        Raises:
            DiskError: it could not be written.
            InputError: the name does not end in `.svg`, or there are no layers.
        """
        check_plot_path(path)
        if not self.layers:
            raise InputError("there are no layers to draw")
        text = draw_report(self.layers, self.total, self._counts, scale=self.scale)
        with atomic_file(path) as file:
            file.write(text.encode())


def check_plot_path(path: str | Path) -> None:
    """Raises InputError unless `ErrorReport.plot` would write to that name: for an early no."""
    if not str(path).lower().endswith(".svg"):
        raise InputError(
            f"`{path}` does not end in `.svg`, the one format that is drawn",
            hint="every browser shows SVG; `rsvg-convert` and Inkscape make a PNG of it",
        )
