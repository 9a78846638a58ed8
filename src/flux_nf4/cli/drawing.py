"""One prompt after another through the pipeline: its events become a bar, files and results."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flux_nf4.cli.console import print_data, print_json, print_note, print_plain
from flux_nf4.cli.findings import counted
from flux_nf4.cli.names import Destination, make_folder, slug, store
from flux_nf4.cli.progress import Progress, duration

if TYPE_CHECKING:
    from pathlib import Path

    from flux_nf4.pipeline.events import ImageDone, StepDone
    from flux_nf4.pipeline.generate import GenerationRequest
    from flux_nf4.pipeline.image_metadata import ImageSettings
    from flux_nf4.pipeline.load import Model


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawing:
    """What stays the same over all prompts of a run."""

    model: Model
    destination: Destination
    progress: Progress
    is_quiet: bool
    is_json: bool

    def draw(self, request: GenerationRequest, *, first_index: int) -> None:
        """Draw one prompt's images, the first of them being image `first_index` of the run.

        Raises:
            DiskError: an image could not be written.
        """
        from flux_nf4.pipeline import events
        from flux_nf4.pipeline.generate import generate

        started_s = time.monotonic()
        num_done = 0
        with _Preview() as preview:
            for event in generate(self.model, request):
                match event:
                    case events.StageStarted():
                        self.progress.stage(event.stage)
                    case events.StepDone():
                        self.progress.step(event.step, event.num_steps)
                        seed, index = request.seed + num_done, first_index + num_done
                        preview.show(event, self._path(request.prompt, seed, index))
                    case events.Notice():
                        self._note(event.message)
                    case events.ImageDone():
                        preview.remove()
                        now_s = time.monotonic()
                        self._finish(request, event, first_index + num_done, now_s - started_s)
                        num_done, started_s = num_done + 1, now_s

    def _finish(
        self, request: GenerationRequest, event: ImageDone, index: int, seconds: float
    ) -> None:
        from flux_nf4.pipeline.image_metadata import save_image

        settings = _settings_of(self.model, request, event.seed)
        path = store(
            lambda name: save_image(name, event.image, settings),
            self._path(request.prompt, event.seed, index),
            replaces=self.destination.replaces,
        )
        self.progress.image_done()
        self.progress.pause()
        if self.is_json:
            shown = {"path": str(path), "index": index, "seconds": round(seconds, 3)}
            print_json(shown | dataclasses.asdict(settings))
        else:
            print_data(str(path))
        if not self.is_quiet:
            size = f"{event.image.width}x{event.image.height}"
            steps = counted(request.num_steps, "step")
            print_plain(f"  seed {event.seed}, {size}, {steps}, {duration(seconds)}")

    def _path(self, prompt: str, seed: int, index: int) -> Path:
        values: dict[str, str | int] = {"seed": seed, "index": index}
        values |= {"prompt": slug(prompt), "model": slug(self.model.facts.name)}
        return self.destination.path(values | {"date": datetime.date.today().isoformat()})

    def _note(self, message: str) -> None:
        if not self.is_quiet:
            print_note(message)


class _Preview:
    """A picture of the unfinished image beside the finished one's place; it goes when that comes.

    Each replaces the one before in a single step, so that a viewer never reads half of one.
    """

    def __init__(self) -> None:
        self.path: Path | None = None

    def __enter__(self) -> _Preview:
        return self

    def __exit__(self, *_error: object) -> None:
        self.remove()

    def show(self, event: StepDone, target: Path) -> None:
        """Write the step's preview, if it has one."""
        from flux_nf4.formats.atomic import atomic_file

        if event.preview is None:
            return
        self.path = target.with_name(f"{target.stem}.preview.png")
        make_folder(self.path.parent)
        with atomic_file(self.path) as file:
            event.preview.save(file, format="PNG")

    def remove(self) -> None:
        """Take the preview away, if there is one."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
            self.path = None


def _settings_of(model: Model, request: GenerationRequest, seed: int) -> ImageSettings:
    from flux_nf4.pipeline.image_metadata import ImageSettings

    return ImageSettings(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        distilled_guidance_scale=(
            request.distilled_guidance_scale if model.embeds_guidance else None
        ),
        seed=seed,
        schedule=request.schedule,
        strength=None if request.image is None else request.strength,
        max_sequence_length=request.max_sequence_length or model.facts.max_sequence_length,
        model=model.facts.name,
        quantization=model.quantization,
        dtype=str(model.dtype).removeprefix("torch."),
    )
