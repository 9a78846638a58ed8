"""Draw `docs/ui-*.png`: the web page at work on the demo model; and the examples that it offers.

    python docs/make_ui_pictures.py [CHROMIUM]

Needs Playwright and a Chromium, found on the PATH unless its file is named. The examples
(`ui/example-*.webp`) are tiles of `docs/demo.png`: run `make_demo_picture.py` first when the demo
model has changed.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from make_demo_picture import COLUMNS, GAP, LABEL, PROMPTS, SIDE
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCS = Path(__file__).parent
UI = DOCS.parent / "src/flux_nf4/server/ui"
# The word of each prompt that names its file, as in `ui/stage.js`.
EXAMPLES = ("apple", "owl", "strawberries", "lion", "house", "stars", "skull", "cat")
SHOWN = (0, 2, 3, 5, 7, 8, 10, 1)
PHONE: dict[str, Any] = {
    "viewport": {"width": 360, "height": 740},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}
DESK: dict[str, Any] = {"viewport": {"width": 1440, "height": 900}}


def make_examples() -> None:
    """Cut the tiles of `demo.png` whose prompts the page offers."""
    sheet = Image.open(DOCS / "demo.png").convert("RGB")
    for name in EXAMPLES:
        (index,) = (i for i, prompt in enumerate(PROMPTS) if name in re.findall(r"\w+", prompt))
        left = GAP + index % COLUMNS * (SIDE + GAP)
        top = GAP + index // COLUMNS * (SIDE + LABEL)
        tile = sheet.crop((left, top, left + SIDE, top + SIDE))
        tile.save(UI / f"example-{name}.webp", quality=80, method=6)


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The address of a server on the demo model."""
    command = [sys.executable, "-m", "flux_nf4", "serve", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = None
        while found is None:
            found = re.search(r"page +(http://\S+)", process.stderr.readline())
        yield found[1]
        process.terminate()
        process.communicate()


def draw(page: Page, prompt: str) -> None:
    """Draw a picture and wait for it."""
    page.locator("#prompt").fill(prompt)
    page.locator("#generate").click()
    page.locator("#result-prompt", has_text=prompt).wait_for()


def begin(page: Page) -> None:
    """Begin a job of two, and one after it; wait for a preview that shows something."""
    page.locator("#num_images").fill("2")
    for prompt in (PROMPTS[10], PROMPTS[0]):
        page.locator("#prompt").fill(prompt)
        page.locator("#generate").click()
        page.locator("#generate:enabled").wait_for()
    page.locator("#work-text", has_text=re.compile(r"Step 1\d")).wait_for()


def paint(page: Page) -> None:
    """Take the picture as a start and paint over the thing at its right."""
    page.locator("#result-tools").get_by_role("button", name="Start from this image").click()
    page.locator("#source-paint").click()
    page.locator("#mask-size").fill("55")
    box = page.locator("#mask-canvas").bounding_box()
    assert box is not None
    places = [
        (box["x"] + box["width"] * x, box["y"] + box["height"] * y)
        for y in (0.32, 0.48, 0.64)
        for x in (0.6, 0.92)
    ]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=8)
    page.mouse.up()


def photograph(browser: Browser, address: str) -> None:
    """Visit the page and take its pictures."""

    def visit(**options: Any) -> Page:
        page = browser.new_context(reduced_motion="reduce", **options).new_page()
        page.goto(address)
        page.locator("#model").wait_for(timeout=120_000)
        page.wait_for_load_state("networkidle")
        return page

    def keep(page: Page, name: str) -> None:
        page.screenshot(path=DOCS / f"ui-{name}.png")

    keep(visit(**DESK), "welcome")
    keep(visit(**PHONE), "phone-welcome")
    page = visit(**DESK)
    for index in SHOWN:
        page.locator("#seed").fill("7")
        draw(page, PROMPTS[index])
    page.locator(".tile").nth(5).click()
    page.locator("#result-prompt", has_text=PROMPTS[3]).wait_for()
    keep(page, "picture")
    paint(page)
    keep(page, "mask")
    page.locator("#mask-done").click()
    page.locator("#strength").fill("0.9")
    draw(page, "a lion and an owl on a teal background")
    keep(page, "inpainted")
    page = visit(color_scheme="dark", **DESK)
    begin(page)
    keep(page, "work-dark")
    keep(visit(color_scheme="dark", locale="zh-CN", **PHONE), "phone-zh-dark")


def main() -> None:
    """Make the examples, then the pictures that show them."""
    make_examples()
    chromium = sys.argv[1] if len(sys.argv) > 1 else shutil.which("chromium")
    with serving() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        photograph(browser, address)
        browser.close()


if __name__ == "__main__":
    main()
