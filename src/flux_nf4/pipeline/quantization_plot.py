"""The picture of a quantisation: the error of every layer, and the levels over the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flux_nf4.pipeline.chart import BLUE, GREEN, MUTED, ORANGE, PURPLE, Page, Panel, ticks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flux_nf4.pipeline.quantization_report import LayerError

# The histogram of weight / scale: a searched scale clips the largest values, up to 1 / 0.75.
HIGHEST = 1.35
NUM_BINS = 270

_GROUPS = {
    "double blocks": BLUE,
    "single blocks": ORANGE,
    "modulation": GREEN,
    "embedders, last layer": PURPLE,
}


def draw_report(
    layers: Sequence[LayerError], total: LayerError, counts: Sequence[int], *, scale: str
) -> str:
    """The picture as SVG text; `counts` are those of weight / scale from -HIGHEST to HIGHEST."""
    page = Page(1000, 790)
    snr = "" if total.snr_db is None else f" ({total.snr_db:.2f} dB)"
    page.text(40, 44, f"{len(layers)} layers in four bits, scales by {scale}", size=22)
    sizes = f"{total.bytes_before / 1e6:,.1f} MB before, {total.bytes_after / 1e6:,.1f} MB after"
    error = f"relative RMSE {100 * total.relative_rmse:.2f} %{snr}"
    page.text(40, 69, f"{error}, {total.num_weights / 1e6:,.1f} M weights, {sizes}", colour=MUTED)
    _draw_layers(page, layers, total)
    _draw_levels(page, counts)
    return page.to_svg()


def _group(name: str) -> str:
    if "modulation." in name or "_mod." in name:
        return "modulation"
    for group in ("double", "single"):
        if name.startswith(f"{group}_blocks."):
            return f"{group} blocks"
    return "embedders, last layer"


def _draw_layers(page: Page, layers: Sequence[LayerError], total: LayerError) -> None:
    percent = [100 * each.relative_rmse for each in layers]
    margin = 0.15 * (max(percent) - min(percent)) + 0.05
    y_range = (max(min(percent) - margin, 0.0), max(percent) + margin)
    panel = Panel(
        page=page,
        left=86,
        top=140,
        width=874,
        height=250,
        x_range=(-0.02 * len(layers) - 0.5, 1.02 * len(layers) - 0.5),
        y_range=y_range,
    )
    panel.title("Error of each layer")
    panel.y_axis(ticks(*y_range), "relative RMSE, %")
    panel.x_axis([], "layers, in the order of the report; dashed: all of them together")
    overall = 100 * total.relative_rmse
    panel.line([(panel.x_range[0], overall), (panel.x_range[1], overall)], MUTED, dash="5 4")
    for index, (each, value) in enumerate(zip(layers, percent, strict=True)):
        text = f"{each.name}: {value:.3f} %, at most {each.max_abs_error:.3g}"
        page.dot(*panel.at(index, value), _GROUPS[_group(each.name)], title=text)
    worst = max(range(len(layers)), key=lambda index: percent[index])
    x, y = panel.at(worst, percent[worst])
    anchor = "end" if x > panel.left + panel.width / 2 else "start"
    page.text(x, y - 9, layers[worst].name, anchor=anchor, size=12, colour=MUTED)
    _draw_legend(page, {_group(each.name) for each in layers}, panel.top - 26)


def _draw_legend(page: Page, groups: set[str], y: float) -> None:
    x = 960.0
    for group in reversed([each for each in _GROUPS if each in groups]):
        x -= 6.4 * len(group)  # about as wide as it will be
        page.text(x, y, group, colour=MUTED)
        page.dot(x - 11, y - 4, _GROUPS[group], radius=5)
        x -= 36


def _draw_levels(page: Page, counts: Sequence[int]) -> None:
    from flux_nf4.nf4.codec import NF4_LEVELS

    share = [100 * count / max(sum(counts), 1) for count in counts]
    highest = 1.12 * max(*share, 1e-9)
    panel = Panel(
        page=page,
        left=86,
        top=500,
        width=874,
        height=220,
        x_range=(-HIGHEST, HIGHEST),
        y_range=(0, highest),
    )
    panel.title("The weights in units of their blocks' scales, and the sixteen levels")
    panel.y_axis(ticks(0, highest, 4), "% of weights")
    width = 2 * HIGHEST / len(share)
    edges = [
        panel.at(x, value)
        for index, value in enumerate(share)
        for x in (index * width - HIGHEST, (index + 1) * width - HIGHEST)
    ]
    base = [panel.at(HIGHEST, 0), panel.at(-HIGHEST, 0)]
    page.area([*edges, *base], BLUE, 0.45)
    for code, level in enumerate(NF4_LEVELS):
        panel.line([(level, 0), (level, highest)], ORANGE, width=1.3)
        x, y = panel.at(level, highest)
        page.text(x, y - 3, f"{code}", anchor="middle", size=11, colour=ORANGE)
    panel.x_axis([-1, -0.5, 0, 0.5, 1], "weight / scale")
