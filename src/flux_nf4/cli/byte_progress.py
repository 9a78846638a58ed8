"""How many bytes are done, for work on files: silent for two seconds, as short work needs no bar.

Then a bar on a terminal, and elsewhere a line each 10 %.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from flux_nf4.cli.console import print_plain, stderr_console
from flux_nf4.cli.findings import num_bytes_text
from flux_nf4.cli.progress import duration

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

PATIENCE_S = 2.0


class ByteProgress:
    """A context to be told of bytes: `with ByteProgress("writing", total) as progress`."""

    def __init__(
        self, verb: str, num_bytes: int, *, num_tensors: int = 0, quiet: bool = False
    ) -> None:
        self.verb = verb
        self.num_tensors = num_tensors
        self.tensors_done = 0
        self.num_bytes = max(num_bytes, 1)
        self.quiet = quiet
        self.bytes_done = 0
        self.tenths_said = 0
        self.started_s = time.monotonic()
        self._bar: RichProgress | None = None

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away, if there is one."""
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_bytes: int, num_tensors: int = 0) -> None:
        """So many bytes, and tensors where they are counted, more are done."""
        self.bytes_done += num_bytes
        self.tensors_done += num_tensors
        if self.quiet or time.monotonic() - self.started_s < PATIENCE_S:
            return
        if stderr_console().is_terminal and not stderr_console().is_dumb_terminal:
            self._draw()
        else:
            self._say()

    @property
    def _tensors(self) -> str:
        return f"{self.tensors_done:,} of {self.num_tensors:,} tensors" if self.num_tensors else ""

    def _say(self) -> None:
        tenths = 10 * self.bytes_done // self.num_bytes
        if tenths == self.tenths_said:
            return
        self.tenths_said = tenths
        passed_s = time.monotonic() - self.started_s
        speed = self.bytes_done / passed_s
        left_s = max(self.num_bytes - self.bytes_done, 0) / max(speed, 1)
        tensors = f"{self._tensors}, " if self._tensors else ""
        print_plain(
            f"{self.verb}: {10 * tenths} % ({tensors}{num_bytes_text(self.bytes_done)}, "
            f"{num_bytes_text(speed)}/s, {duration(left_s)} left)"
        )

    def _draw(self) -> None:
        from rich import progress

        if self._bar is None:
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=30, complete_style="cyan", finished_style="cyan"),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(compact=True),
                console=stderr_console(),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bar.add_task(self.verb, total=self.num_bytes)
            self._bar.start()
        self._bar.update(
            self._bar.task_ids[0],
            completed=self.bytes_done,
            description=f"{self.verb}  {self._tensors}".rstrip(),
        )
