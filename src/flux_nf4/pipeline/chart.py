"""Charts as SVG text, with no library: a page, and panels on it that know their axes.

SVG because it is text: sharp at any size, a few kilobytes, and what the mouse points at can say
its name. Lengths are pixels of the page from its upper left corner; `Panel.at` makes them of data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

INK, MUTED, GRID, PAPER = "#22262c", "#626b77", "#e4e0d6", "#fbfaf7"
BLUE, ORANGE, GREEN, PURPLE = "#4a76cf", "#d9822b", "#3f9a55", "#8d57c0"
_FONT = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, `most` at the most and rarely fewer than half of that."""
    least_step = (high - low) / most
    power = 10.0 ** math.floor(math.log10(least_step))
    step = next(each * power for each in (1, 2, 5, 10) if each * power >= least_step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


@dataclass(slots=True)
class Page:
    """A drawing of a given size: shapes are added in the order in which they cover one another."""

    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def line(
        self,
        points: Iterable[tuple[float, float]],
        colour: str,
        *,
        width: float = 1,
        dash: str = "",
    ) -> None:
        """A line through points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"'
            f"{dashes}/>"
        )

    def area(self, points: Iterable[tuple[float, float]], colour: str, opacity: float = 1) -> None:
        """A filled polygon."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polygon points="{path}" fill="{colour}" fill-opacity="{opacity}"/>')

    def dot(self, x: float, y: float, colour: str, *, radius: float = 3, title: str = "") -> None:
        """A disc; the mouse over it shows its title."""
        self.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" fill-opacity="0.85">'
            f"<title>{escape(title)}</title></circle>"
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "start",
        size: int = 13,
        colour: str = INK,
        turn: int = 0,
    ) -> None:
        """One line of text; `turn` is in degrees, clockwise."""
        turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
            f'fill="{colour}"{turned}>{escape(text)}</text>'
        )

    def to_svg(self) -> str:
        """The page as a file's text."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" font-family="{_FONT}">'
        )
        paper = f'<rect width="{self.width}" height="{self.height}" rx="12" fill="{PAPER}"/>'
        return "\n".join([head, paper, *self.parts, "</svg>", ""])


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A rectangle of a page with linear axes."""

    page: Page
    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where on the page a point of the data lies."""
        (x_low, x_high), (y_low, y_high) = self.x_range, self.y_range
        return (
            self.left + self.width * (x - x_low) / (x_high - x_low),
            self.top + self.height * (y_high - y) / (y_high - y_low),
        )

    def line(
        self,
        points: Iterable[tuple[float, float]],
        colour: str,
        *,
        width: float = 1,
        dash: str = "",
    ) -> None:
        """A line through points of the data."""
        self.page.line([self.at(x, y) for x, y in points], colour, width=width, dash=dash)

    def title(self, text: str) -> None:
        """What the panel shows, above it."""
        self.page.text(self.left, self.top - 26, text, size=15)

    def x_axis(self, values: Sequence[float], label: str) -> None:
        """Numbers below the panel."""
        for value in values:
            x, y = self.at(value, self.y_range[0])
            self.page.line([(x, y), (x, y + 5)], MUTED)
            self.page.text(x, y + 19, f"{value:g}", anchor="middle", colour=MUTED)
        middle = self.left + self.width / 2
        bottom = self.top + self.height + 39
        self.page.text(middle, bottom, label, anchor="middle", colour=MUTED)
        self.line([(self.x_range[0], self.y_range[0]), (self.x_range[1], self.y_range[0])], MUTED)

    def y_axis(self, values: Sequence[float], label: str) -> None:
        """Numbers at the left of the panel, each with a line across it."""
        for value in values:
            self.line([(self.x_range[0], value), (self.x_range[1], value)], GRID)
            x, y = self.at(self.x_range[0], value)
            self.page.text(x - 8, y + 4, f"{value:g}", anchor="end", colour=MUTED)
        middle = self.top + self.height / 2
        self.page.text(self.left - 50, middle, label, anchor="middle", colour=MUTED, turn=-90)
