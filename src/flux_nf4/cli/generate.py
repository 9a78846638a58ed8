"""`flux-nf4 generate`: from prompts to PNG files.

Everything that can be wrong with the request is found before the model is loaded; torch is
imported only when all of that is right.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flux_nf4.cli.console import print_note
from flux_nf4.cli.drawing import Drawing
from flux_nf4.cli.names import plan_destination
from flux_nf4.cli.options import argument, option, shortened
from flux_nf4.cli.progress import make_progress
from flux_nf4.cli.prompts import read_prompts
from flux_nf4.cli.settings import Settings
from flux_nf4.cli.verb import Verb, debug_option, json_option
from flux_nf4.cli.words import load_words
from flux_nf4.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flux_nf4.pipeline.generate import GenerationRequest
    from flux_nf4.pipeline.load import Model

_DEMO = "demo"
_NARROW_HIDDEN_SIZE, _SMALL_PIXELS = 512, 512 * 512
_SCHNELL_STEPS = 4  # what it was distilled for
_DEFAULT_STEPS = 20
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
    size = requested_size(options)
    destination = plan_destination(options.output, len(prompts) * options.count)
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    _say_what_the_demo_knows(options, prompts)

    from flux_nf4.pipeline.limits import check_size
    from flux_nf4.pipeline.load import LoadSettings, load_model

    check_size(size.width or 1024, size.height or 1024)
    with make_progress(quiet=options.quiet) as progress:
        progress.stage("load")
        is_demo = options.model in (None, _DEMO)
        path = None if is_demo else Path(str(options.model)).expanduser()
        model = load_model(path, LoadSettings(device=options.device))
        requests = [_request(options, model, size, prompt, seed) for prompt in prompts]
        _suit_threads(model, requests[0])
        progress.plan(len(requests) * options.count, requests[0].num_inference_steps)
        for note in model.notes if not options.quiet else ():
            print_note(note)
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


def requested_size(options: Settings) -> Size:
    """The size from `--size`, or from `--width` and `--height`.

    Raises:
        InputError: `--size` is not `WxH`.
    """
    if options.size is None:
        return Size(width=options.width, height=options.height)
    match = re.fullmatch(r"(\d{1,6})(?:\s*[xX×]\s*(\d{1,6}))?", options.size.strip())  # noqa: RUF001
    if match is None:
        raise InputError(
            f"`--size` must be WIDTHxHEIGHT, got `{shortened(options.size)}`",
            hint="for example `--size 896x1152`",
        )
    width, height = match.group(1), match.group(2) or match.group(1)
    return Size(width=int(width), height=int(height))


def _say_what_the_demo_knows(options: GenerateOptions, prompts: Sequence[str]) -> None:
    if options.quiet or options.model not in (None, _DEMO):
        return
    if options.model is None:
        print_note(_DEMO_NOTE)
    words = load_words()
    for prompt in prompts:
        if not words.things_in(prompt):
            print_note(f"`{shortened(prompt)}` {_UNKNOWN_NOTE}")


def _request(
    options: GenerateOptions, model: Model, size: Size, prompt: str, seed: int
) -> GenerationRequest:
    from flux_nf4.pipeline.generate import GenerationRequest

    steps = _SCHNELL_STEPS if model.variant == "schnell" else _DEFAULT_STEPS
    return GenerationRequest(
        prompt=prompt,
        negative_prompt=options.negative,
        width=size.width or model.facts.default_size,
        height=size.height or model.facts.default_size,
        num_inference_steps=options.steps or steps,
        distilled_guidance_scale=options.guidance,
        guidance_scale=options.true_cfg,
        seed=seed,
        num_images=options.count,
        schedule=options.schedule,
        preview=options.preview,
    )


def _suit_threads(model: Model, request: GenerationRequest) -> None:
    """Draw small images of a narrow model with one thread.

    Its operations are so short that threads wait for each other more than they work: 20 steps of
    the demo model took 0.8 s with one thread and 1.0 s with four on four idle cores. With other
    programs running, where a barrier waits for a thread that is not scheduled, four took 91 s.
    """
    import torch

    is_narrow = model.transformer.config.hidden_size <= _NARROW_HIDDEN_SIZE
    is_small = request.width * request.height <= _SMALL_PIXELS
    if model.device.type == "cpu" and is_narrow and is_small:
        torch.set_num_threads(1)


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
