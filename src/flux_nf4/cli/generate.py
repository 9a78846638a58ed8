"""`flux-nf4 generate`: from prompts to PNG files.

Everything that can be wrong with the request is found before the model is loaded; torch is
imported only when all of that is right.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flux_nf4.cli.console import print_note
from flux_nf4.cli.drawing import Drawing
from flux_nf4.cli.names import plan_destination
from flux_nf4.cli.options import argument, option, shortened
from flux_nf4.cli.paths import model_path
from flux_nf4.cli.progress import make_progress
from flux_nf4.cli.prompts import read_prompts
from flux_nf4.cli.repeat import note_differences, read_record
from flux_nf4.cli.settings import Settings
from flux_nf4.cli.source import Source, read_source
from flux_nf4.cli.verb import Verb, debug_option, json_option
from flux_nf4.cli.words import load_words
from flux_nf4.errors import InputError
from flux_nf4.memory.amounts import parse_limit
from flux_nf4.pipeline.limits import MIN_SIZE, check_size, default_steps, size_like

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flux_nf4.pipeline.generate import GenerationRequest
    from flux_nf4.pipeline.load import Model

_OWN_SIZE = 1024  # FLUX.1-dev's, until the model is known
_NUM_PREVIEWS = 8  # in the course of an image
_DEMO_NOTE = "built-in demo model; for FLUX.1-dev: `-m flux1-dev-bnb-nf4-v2.safetensors`"
_UNKNOWN_NOTE = "names nothing the demo model knows; `flux-nf4 demo` lists what it knows"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions(Settings):
    """The options of `generate`: the settings, and what differs from run to run."""

    prompt: str | None = argument("PROMPT", help="what to draw")
    prompt_file: str | None = option(
        "--prompt-file",
        metavar="FILE",
        help="one prompt a line; `-`: standard input",
        group="What to draw",
    )
    from_image: str | None = option(
        "--from",
        metavar="IMAGE",
        help="repeat this image by its settings; options given win",
        group="What to draw",
    )
    image: str | None = option(
        "--image",
        metavar="FILE",
        help="PNG, JPEG or WebP to start from; its size is the default",
        group="What to draw",
    )
    mask: str | None = option(
        "--mask",
        metavar="FILE",
        help="draw only its white part anew; the rest stays",
        group="What to draw",
    )
    strength: float | None = option(
        "--strength",
        metavar="X",
        minimum=0.01,
        maximum=1,
        help="how much to change it, 0.01 to 1 [0.6]",
        group="What to draw",
    )
    json: bool = json_option()
    debug: bool = debug_option()


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What was asked for, in pixels; None: the model's own."""

    width: int | None
    height: int | None


def run(options: GenerateOptions) -> int:
    """Draw every image of every prompt; each is saved as soon as it is done."""
    prompts = read_prompts(options.prompt, options.prompt_file)
    size = requested_size(options.size, options.width, options.height)
    source = read_source(options)
    path = model_path(options.model)
    vram, ram = parse_limit(options.vram, "--vram"), parse_limit(options.ram, "--ram")
    destination = plan_destination(options.output, len(prompts) * options.count)
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    for prompt in prompts:  # what is wrong is told now, and not when the model is loaded
        _request(options, size, source, prompt, seed)
    _say_what_the_demo_knows(options, prompts)
    origin = read_record(options.from_image) if options.from_image else None

    with make_progress(quiet=options.quiet) as progress:
        progress.stage("load")  # of which importing PyTorch is the longer half

        import torch

        from flux_nf4.pipeline.load import LoadSettings, load_model
        from flux_nf4.pipeline.threads import suited_num_threads

        model = load_model(
            path,
            LoadSettings(
                device=options.device,
                vram=vram,
                ram=ram,
                arithmetic=options.arithmetic,
                attention=options.attention,
            ),
        )
        requests = [_request(options, size, source, prompt, seed, model) for prompt in prompts]
        width, height = requests[0].width, requests[0].height
        now = torch.get_num_threads()
        torch.set_num_threads(suited_num_threads(model, width, height, otherwise=now))
        progress.plan(len(requests) * options.count, requests[0].num_steps)
        for note in model.notes if not options.quiet else ():
            print_note(note)
        if origin is not None and not options.quiet:
            note_differences(str(options.from_image), origin.settings, model)
        drawing = Drawing(
            model=model,
            destination=destination,
            progress=progress,
            is_quiet=options.quiet,
            is_json=options.json,
        )
        for number, request in enumerate(requests):
            drawing.draw(request, first_index=number * options.count + 1)
    return 0


def requested_size(text: str | None, width: int | None = None, height: int | None = None) -> Size:
    """The size from `--size`, or from `--width` and `--height`.

    Raises:
        InputError: `--size` is not `WxH`, or FLUX draws no such size.
    """
    size = Size(width=width, height=height) if text is None else _parsed_size(text)
    width, height = (MIN_SIZE if side is None else side for side in (size.width, size.height))
    check_size(width, height)
    return size


def _parsed_size(text: str) -> Size:
    match = re.fullmatch(r"(\d{1,6})(?:\s*[xX×]\s*(\d{1,6}))?", text.strip())  # noqa: RUF001
    if match is None:
        raise InputError(
            f"`--size` must be WIDTHxHEIGHT, got `{shortened(text)}`",
            hint="for example `--size 896x1152`",
        )
    width, height = match.group(1), match.group(2) or match.group(1)
    return Size(width=int(width), height=int(height))


def _say_what_the_demo_knows(options: GenerateOptions, prompts: Sequence[str]) -> None:
    if options.quiet or model_path(options.model) is not None:
        return
    if options.model is None:
        print_note(_DEMO_NOTE)
    for prompt in load_words().unknown(prompts):
        print_note(f"`{shortened(prompt)}` {_UNKNOWN_NOTE}")


def _request(
    options: GenerateOptions,
    size: Size,
    source: Source,
    prompt: str,
    seed: int,
    model: Model | None = None,
) -> GenerationRequest:
    """What is asked of `model`; without one, its own size and steps are FLUX.1-dev's."""
    from flux_nf4.pipeline.request import GenerationRequest

    own = _OWN_SIZE if model is None else model.facts.default_size
    width, height = size.width or own, size.height or own
    if source.image is not None:
        width, height = size_like(
            source.image.size, width=size.width, height=size.height, default_size=own
        )

    steps = default_steps("dev" if model is None else model.variant)
    return GenerationRequest(
        prompt=prompt,
        negative_prompt=options.negative,
        width=width,
        height=height,
        num_inference_steps=options.steps or steps,
        distilled_guidance_scale=options.guidance,
        guidance_scale=options.true_cfg,
        seed=seed,
        num_images=options.count,
        schedule=options.schedule,
        image=source.image,
        mask_image=source.mask_image,
        strength=source.strength,
        num_previews=_NUM_PREVIEWS if options.preview else 0,
    )


VERB = Verb(
    name="generate",
    summary="Make images from a prompt.",
    options=GenerateOptions,
    run=run,
    examples=(
        '"a red apple on a light blue background"',
        '"a cat" -n 4 -o cats/',
        '"an astronaut" -m flux1-dev-bnb-nf4-v2.safetensors -s 896x1152',
    ),
    note="A file named exactly is replaced; any other name that is taken gets -2, -3 ...",
)
