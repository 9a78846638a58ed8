"""How far it is: a bar on a terminal, a line each 10 % elsewhere, nothing when quiet."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from flux_nf4.cli.console import print_plain, stderr_console

if TYPE_CHECKING:
    from flux_nf4.pipeline.events import Stage

STAGE_NAMES: dict[Stage, str] = {
    "load": "loading the model",
    "encode": "reading the image",
    "text": "reading the prompt",
    "modulation": "preparing the steps",
    "denoise": "denoising",
    "decode": "decoding the image",
}


class Progress:
    """Says nothing; the kinds below tell more. A context, so that a bar never outlives an error."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_error: object) -> None:
        self.pause()

    def plan(self, num_images: int, num_steps: int) -> None:
        """So many images of so many steps each are to come."""

    def stage(self, stage: Stage) -> None:
        """A stage begins."""

    def step(self, step: int, num_steps: int) -> None:
        """A denoising step is done."""

    def image_done(self) -> None:
        """An image is finished."""

    def pause(self) -> None:
        """Make room for a line of output; the next call of any other kind goes on."""


def make_progress(*, quiet: bool) -> Progress:
    """The kind that suits standard error."""
    if quiet:
        return Progress()
    if stderr_console().is_terminal and not stderr_console().is_dumb_terminal:
        return BarProgress()
    return LineProgress()


class LineProgress(Progress):
    """A line for loading, and one each 10 % of all steps, for logs."""

    def __init__(self) -> None:
        self.num_steps = 1
        self.steps_done = 0
        self.tenths_said = 0
        self.started_s: float | None = None

    def plan(self, num_images: int, num_steps: int) -> None:
        """So many images of so many steps each are to come."""
        self.num_steps = num_images * num_steps

    def stage(self, stage: Stage) -> None:
        """Loading is said; the other stages are short beside denoising."""
        if stage == "load":
            print_plain(STAGE_NAMES[stage])
        elif stage == "denoise" and self.started_s is None:
            self.started_s = time.monotonic()

    def step(self, _step: int, _num_steps: int) -> None:
        """Count, and say so where another tenth is full."""
        self.steps_done += 1
        tenths = 10 * self.steps_done // self.num_steps
        if tenths == self.tenths_said or self.started_s is None:
            return
        self.tenths_said = tenths
        passed_s = time.monotonic() - self.started_s
        left_s = passed_s / self.steps_done * (self.num_steps - self.steps_done)
        left = f", {duration(left_s)} left" if left_s else ""
        print_plain(f"denoising: {10 * tenths} % ({self.steps_done}/{self.num_steps} steps){left}")


class BarProgress(Progress):
    """One bar over all images: the stage, the image, the steps and the time left."""

    def __init__(self) -> None:
        from rich import progress

        self.num_images = 1
        self.images_done = 0
        self.num_steps = 1
        self.bar = progress.Progress(
            progress.SpinnerColumn(finished_text=" "),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=30, complete_style="cyan", finished_style="cyan"),
            progress.TextColumn("{task.fields[steps]}"),
            progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=stderr_console(),
            transient=True,
            # Results go to standard output as they are; Rich would send them to its own console.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.task = self.bar.add_task("", total=None, steps="")

    def plan(self, num_images: int, num_steps: int) -> None:
        """So many images of so many steps each are to come."""
        self.num_images, self.num_steps = num_images, num_steps
        self.bar.reset(self.task, total=num_images * num_steps, start=False, steps="")

    def stage(self, stage: Stage) -> None:
        """Name the stage, and which image of how many it is for."""
        which = f" {self.images_done + 1} of {self.num_images}" if self.num_images > 1 else ""
        self.bar.start()
        self.bar.update(self.task, description=f"{STAGE_NAMES[stage]}{which}", refresh=True)
        if stage == "denoise":
            self.bar.start_task(self.task)

    def step(self, step: int, num_steps: int) -> None:
        """Move the bar."""
        self.bar.start()
        self.bar.update(self.task, advance=1, steps=f"{step}/{num_steps} steps", refresh=True)

    def image_done(self) -> None:
        """Count the image."""
        self.images_done += 1

    def pause(self) -> None:
        """Take the bar away; being transient, it leaves nothing behind."""
        self.bar.stop()


def duration(seconds: float) -> str:
    """A time as people say it: `0.4 s`, `12 s`, `3 min 5 s`, `2 h 4 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
