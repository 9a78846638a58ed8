"""Draw the figures of `docs/nf4.md`.

    python -m benchmarks.scale_search    # measures; a minute
    python docs/make_nf4_figures.py      # draws, from that and the demo model

Each figure is made by one function below, which says what it shows.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.scale_search import DEMO_WEIGHTS, RESULT
from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.nf4 import reference
from flux_nf4.nf4.codec import NF4_LEVELS, NF4Weight, levels
from flux_nf4.nf4.search import quantize_searched
from flux_nf4.pipeline.chart import BLUE, GREEN, INK, MUTED, ORANGE, Page, Panel, ticks
from flux_nf4.pipeline.convert import is_linear_weight
from flux_nf4.pipeline.quantization_report import ErrorReport

FOLDER = Path(__file__).parent
HIGHEST_QUANTILE = 0.9677083  # QLoRA: between 1 - 1/30 and 1 - 1/32
COLOURS = {"absmax": MUTED, "search": BLUE, "least": GREEN}


def draw_levels() -> Page:
    """The normal distribution cut into strips of equal weight, whose edges are the levels."""
    normal = NormalDist()
    width = normal.inv_cdf(HIGHEST_QUANTILE)
    page = Page(900, 360)
    panel = Panel(
        page=page, left=70, top=70, width=800, height=220, x_range=(-1.35, 1.35), y_range=(0, 0.42)
    )
    panel.title("The sixteen levels cut the normal distribution into strips of equal weight")
    for index, (low, high) in enumerate(pairwise(NF4_LEVELS)):
        xs = [low + (high - low) * step / 20 for step in range(21)]
        edge = [panel.at(x, normal.pdf(x * width)) for x in xs]
        colour = BLUE if high <= 0 else ORANGE
        page.area([panel.at(low, 0), *edge, panel.at(high, 0)], colour, 0.5 if index % 2 else 0.25)
    curve = [index / 100 * 1.35 for index in range(-100, 101)]
    panel.line([(x, normal.pdf(x * width)) for x in curve], INK, width=1.5)
    for code, level in enumerate(NF4_LEVELS):
        height = normal.pdf(level * width)
        panel.line([(level, 0), (level, height)], INK)
        x, y = panel.at(level, height)
        page.text(x, y - 6, str(code), anchor="middle", size=11)
    panel.x_axis([-1, -0.5, 0, 0.5, 1], "level")
    page.text(110, 130, "seven strips of 6.7 %", colour=BLUE)
    page.text(830, 130, "eight strips of 5.8 %", anchor="end", colour=ORANGE)
    return page


def error_at(block_S: torch.Tensor, scale: float) -> float:
    """The relative RMSE of a block under a scale, in percent."""
    codes = reference.nearest_codes((block_S / scale).clamp(-1, 1), "nf4")
    error = block_S - scale * levels("nf4")[codes.int()]
    return 100 * float(error.norm() / block_S.norm())


def draw_one_block() -> Page:
    """The error of one Gaussian block under every scale, of both signs."""
    block_S = torch.randn(64, generator=torch.Generator().manual_seed(14))
    absmax = float(block_S.abs().max())
    scales = [0.7 + 0.001 * index for index in range(1001)]
    curves = {sign: [error_at(block_S, sign * s * absmax) for s in scales] for sign in (1, -1)}
    page = Page(900, 400)
    highest = 14.0
    panel = Panel(
        page=page, left=86, top=80, width=784, height=240, x_range=(0.7, 1.7), y_range=(6, highest)
    )
    panel.title("The error of one block of 64 under every scale")
    panel.y_axis(ticks(6, highest), "relative RMSE, %")
    panel.x_axis(ticks(0.7, 1.7, 10), "size of the scale / absmax")
    for sign, colour, name in ((1, ORANGE, "positive"), (-1, BLUE, "negative")):
        inside = [(s, e) for s, e in zip(scales, curves[sign], strict=True) if e <= highest]
        panel.line(inside, colour, width=1.4)
        page.text(870, 50 + 20 * (sign < 0), f"{name} scales", anchor="end", colour=colour)
    sign = min(curves, key=lambda each: min(curves[each]))
    best = min(range(len(scales)), key=lambda index: curves[sign][index])
    marks = ((1.0, error_at(block_S, absmax), "absmax"), (scales[best], curves[sign][best], "best"))
    for scale, error, name in marks:
        x, y = panel.at(scale, error)
        page.dot(x, y, INK, radius=5)
        page.text(x, y + 22, f"{name}: {error:.2f} %", anchor="middle")
    return page


def draw_histograms() -> Page:
    """Gaussian weights in units of their blocks' scales, by absmax and by search."""
    w_GS = torch.randn(2**16, 64, generator=torch.Generator().manual_seed(0))
    ways = {
        "absmax": (reference.quantize(w_GS), MUTED),
        "search": (quantize_searched(w_GS), BLUE),
    }
    page = Page(900, 590)
    for index, (name, (weight, colour)) in enumerate(ways.items()):
        relative = w_GS / weight.float_absmax()[:, None]
        counts = torch.histc(relative, bins=270, min=-1.35, max=1.35) / w_GS.numel() * 100
        panel = Panel(
            page=page,
            left=86,
            top=70 + 275 * index,
            width=784,
            height=170,
            x_range=(-1.35, 1.35),
            y_range=(0, 1.4),
        )
        error = 100 * float((reference.dequantize(weight) - w_GS).norm() / w_GS.norm())
        panel.title(f"Scales by {name}: relative RMSE {error:.2f} %")
        panel.y_axis([0, 0.5, 1], "% of weights")
        steps = [(i * 0.01 - 1.35, float(c)) for i, c in enumerate(counts)]
        outline = [panel.at(x + dx, y) for x, y in steps for dx in (0, 0.01)]
        page.area([panel.at(-1.35, 0), *outline, panel.at(1.35, 0)], colour, 0.45)
        for level in NF4_LEVELS:
            panel.line([(level, 0), (level, 1.4)], ORANGE)
        panel.x_axis([-1, -0.5, 0, 0.5, 1], "weight / scale")
    return page


def draw_ways() -> Page:
    """The error of every way to choose scales, on Gaussian weights and on the demo model's."""
    results = json.loads(RESULT.read_text(encoding="utf-8"))
    page = Page(900, 480)
    page.text(30, 40, "Relative RMSE of every way to choose the scales of blocks of 64", size=16)
    for left, name, title in ((290, "gaussian", "Gaussian weights"), (600, "demo", "demo model")):
        page.text(left, 76, title, size=14)
        for index, (way, row) in enumerate(results[name].items()):
            y = 102 + 40 * index
            error = 100 * row["relative_rmse"]
            width = 26 * error
            colour = COLOURS[next((key for key in COLOURS if way.startswith(key)), "absmax")]
            page.area(
                [(left, y - 12), (left + width, y - 12), (left + width, y + 8), (left, y + 8)],
                colour,
                0.6,
            )
            page.text(left + width + 6, y + 4, f"{error:.2f} %", size=12)
            if name == "gaussian":
                page.text(left - 12, y + 4, way, anchor="end")
    return page


def draw_layers() -> None:
    """What `flux-nf4 quantize --scale search --plot` draws of the demo model."""
    report = ErrorReport(scale="search")
    for name, entry in open_checkpoint(DEMO_WEIGHTS).components["transformer"].entries.items():
        if is_linear_weight(name, entry) and not isinstance(entry, NF4Weight):
            report.add(name, entry, quantize_searched(entry))
    report.plot(FOLDER / "nf4-layers.svg")


def main() -> None:
    """Draw all."""
    pages = {
        "nf4-levels": draw_levels(),
        "nf4-one-block": draw_one_block(),
        "nf4-histograms": draw_histograms(),
        "nf4-ways": draw_ways(),
    }
    for name, page in pages.items():
        (FOLDER / f"{name}.svg").write_text(page.to_svg(), encoding="utf-8")
    draw_layers()


if __name__ == "__main__":
    main()
