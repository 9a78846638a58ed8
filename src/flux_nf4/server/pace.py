"""How long a job will take, from how long others took: seconds for a pixel in a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flux_nf4.server.jobs import Job, JobSpec

_SHARE_OF_THE_NEWEST = 0.2


class Pace:
    """An average over steps in which the newest count most; None until there was one."""

    def __init__(self) -> None:
        self._s_per_pixel: float | None = None

    def learn(self, spec: JobSpec, step_s: float) -> None:
        """A step of such a job took so long."""
        newest = step_s / _pixels_per_step(spec)
        if self._s_per_pixel is None:
            self._s_per_pixel = newest
        else:
            self._s_per_pixel += _SHARE_OF_THE_NEWEST * (newest - self._s_per_pixel)

    def remaining_s(self, job: Job) -> float | None:
        """How long a worker will draw the rest of a job."""
        if self._s_per_pixel is None:
            return None
        # With an image to start from the steps are fewer; how many, the first of them tells.
        all_steps = job.num_steps * job.spec.num_images
        num_left = all_steps * (1 - job.progress)
        return num_left * _pixels_per_step(job.spec) * self._s_per_pixel


def _pixels_per_step(spec: JobSpec) -> int:
    return spec.width * spec.height * (2 if spec.guidance_scale > 1 else 1)
