"""Draw `docs/demo.png`: twelve prompts of the demo model, each with its prompt below it.

    python docs/make_demo_picture.py

Each tile is what `flux-nf4 generate PROMPT --seed 7` writes.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from flux_nf4.pipeline.events import ImageDone
from flux_nf4.pipeline.generate import GenerationRequest, generate
from flux_nf4.pipeline.load import load_model

PROMPTS = (
    "a red apple on a light blue background",
    "an owl above a mushroom on a beige background",
    "three strawberries on a white background",
    "a lion and a crown on a teal background",
    "a small rocket in the top left corner on a dark blue background",
    "a fire truck to the right of a house on a light green background",
    "a pizza and a mug of beer",
    "four stars on a dark blue background",
    "a skull to the left of a pumpkin on a black background",
    "two bananas side by side",
    "a cat next to a dog on a lavender background",
    "a penguin on the left",
)
SEED = 7
SIDE, COLUMNS, GAP, LABEL = 256, 4, 12, 44


def main() -> None:
    """Draw and tile."""
    model, font = load_model(None), ImageFont.load_default(15)
    rows = -(-len(PROMPTS) // COLUMNS)
    width, height = COLUMNS * (SIDE + GAP) + GAP, rows * (SIDE + LABEL) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, prompt in enumerate(PROMPTS):
        request = GenerationRequest(prompt=prompt, width=SIDE, height=SIDE, seed=SEED)
        (done,) = (e for e in generate(model, request) if isinstance(e, ImageDone))
        left = GAP + index % COLUMNS * (SIDE + GAP)
        top = GAP + index // COLUMNS * (SIDE + LABEL)
        sheet.paste(done.image, (left, top))
        text = prompt
        if font.getlength(text) > SIDE:
            cut = text.rfind(" ", 0, len(text) * 6 // 10)
            text = f"{text[:cut]}\n{text[cut + 1 :]}"
        pen.multiline_text((left, top + SIDE + 3), text, fill="#333", font=font, spacing=1)
    sheet.save(Path(__file__).with_name("demo.png"), optimize=True)


if __name__ == "__main__":
    main()
