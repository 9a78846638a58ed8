"""`--from IMAGE`: what made an image, as values of the options that make it again.

They count less than flags and more than the environment and the settings files: those hold what is
usual, and an image is repeated as it was.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from flux_nf4.cli.console import print_note
from flux_nf4.cli.paths import path_of
from flux_nf4.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flux_nf4.pipeline.image_metadata import ImageRecord, ImageSettings
    from flux_nf4.pipeline.load import Model

# Our names of settings, A1111's, and the options that set them.
_OPTIONS = (
    ("prompt", "Prompt", "prompt"),
    ("negative_prompt", "Negative prompt", "negative"),
    ("seed", "Seed", "seed"),
    ("num_inference_steps", "Steps", "steps"),
    ("distilled_guidance_scale", "Distilled CFG Scale", "guidance"),
    ("guidance_scale", "CFG scale", "true_cfg"),
    ("width", "", "width"),
    ("height", "", "height"),
    ("schedule", "", "schedule"),
    ("strength", "", "strength"),
)
_A1111_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")


def read_record(image: str) -> ImageRecord:
    """What an image tells about its making.

    Raises:
        DiskError: the file cannot be read.
        FormatError: it is no image, or damaged.
        InputError: it tells nothing.
    """
    from flux_nf4.pipeline.image_metadata import read_image

    record = read_image(path_of(image))
    if record.settings is None and not record.pairs.get("Prompt"):
        raise InputError(
            f"`{image}` holds no settings to repeat",
            hint="an image keeps them as a file; a screenshot, or a copy that a site has made "
            "smaller, does not",
        )
    return record


def option_values(record: ImageRecord) -> dict[str, object]:
    """An image's settings as values of options: typed where they are ours, else as text."""
    if record.settings is None:
        return _from_a1111(record.pairs)
    values = {option: getattr(record.settings, ours) for ours, _, option in _OPTIONS}
    # One that was made together with others is repeated alone: it has a seed of its own.
    return {name: value for name, value in values.items() if value is not None} | {"count": 1}


def _from_a1111(pairs: Mapping[str, str]) -> dict[str, object]:
    values: dict[str, object] = {
        option: pairs[theirs] for _, theirs, option in _OPTIONS if theirs in pairs
    }
    if "guidance" not in values:
        # A scale of CFG meant for another model; FLUX would take twice the time and look burnt.
        values.pop("true_cfg", None)
    if size := _A1111_SIZE.fullmatch(pairs.get("Size", "")):
        values |= {"width": size[1], "height": size[2]}
    if pairs.get("Schedule type") == "Simple":
        values["schedule"] = "forge"
    return values | {"count": 1}


def note_differences(image: str, settings: ImageSettings | None, model: Model) -> None:
    """Say why the image may not come out the same."""
    if settings is None:
        print_note(f"`{image}` was not made by flux-nf4: the same settings give another image")
        return
    dtype = str(model.dtype).removeprefix("torch.")
    then = (settings.model, settings.quantization, settings.dtype)
    now = (model.facts.name, model.quantization, dtype)
    if then != now:
        print_note(
            "`{}` was made with {} ({}, {}), and this is {} ({}, {}): the image will differ".format(
                image, *then, *now
            )
        )
