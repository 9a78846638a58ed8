"""From the figures of `benchmarks.quality` to a JSON file, a Markdown table and a picture."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = {
    "thing": "thing",
    "background": "background",
    "count": "count",
    "place": "place",
    "pair": "two things",
    "tint": "tint",
    "unknown_thing": "unknown words",
    "psnr_one": "PSNR one",
    "psnr_two": "PSNR two",
    "psnr_to_bf16": "PSNR to bf16",
    "bytes": "MB",
}
TITLES = {
    "bf16": "bf16",
    "fp8": "fp8 e4m3 storage",
    "nf4-v1": "NF4 v1",
    "nf4-v2": "NF4 v2",
    "nf4-v2-search": "NF4 v2, scales searched",
    "fp4": "FP4",
    "shipped": "shipped: NF4 v2, trained through NF4",
}
LABEL_HEIGHT = 28


def cell(row: dict[str, Any], column: str) -> str:
    """One figure as the table shows it."""
    value = row.get(column)
    if value is None:
        return ""
    if column == "bytes":
        return f"{value / 1e6:.2f}"
    return f"{value:.1f}"


def table(formats: dict[str, dict[str, Any]]) -> str:
    """The figures as a Markdown table: scores in percent, PSNR in dB."""
    lines = [f"| format | {' | '.join(COLUMNS.values())} |", "|---|" + "---|" * len(COLUMNS)]
    for name, row in formats.items():
        lines.append(f"| {TITLES[name]} | {' | '.join(cell(row, key) for key in COLUMNS)} |")
    return "\n".join(lines)


def draw_sheet(formats: dict[str, dict[str, Any]], path: Path) -> None:
    """Six prompts in every format: one row a format, its name above the row."""
    from PIL import Image, ImageDraw, ImageFont

    pictures = {name: row["pictures"] for name, row in formats.items()}
    count, _, side, _ = next(iter(pictures.values())).shape
    height = side + LABEL_HEIGHT
    sheet = Image.new("RGB", (count * (side + 4) - 4, len(pictures) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for row, (name, images) in enumerate(pictures.items()):
        pen.text((4, row * height + 5), TITLES[name], fill="black", font=font)
        for column, image in enumerate(images):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy())
            sheet.paste(tile, (column * (side + 4), row * height + LABEL_HEIGHT))
    sheet.save(path, optimize=True)


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write `quality.json`, `quality.md` and `quality.png` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_sheet(results["formats"], folder / "quality.png")
    figures = {
        name: {key: value for key, value in row.items() if key != "pictures"}
        for name, row in results["formats"].items()
    }
    text = json.dumps({**results, "formats": figures}, indent=1)
    (folder / "quality.json").write_text(text + "\n", encoding="utf-8")
    (folder / "quality.md").write_text(table(figures) + "\n", encoding="utf-8")
