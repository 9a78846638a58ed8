"""The jobs that can be asked for: all that are not finished, and the newest of the finished."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flux_nf4.server.jobs import Job
    from flux_nf4.server.status import EngineSettings


class KnownJobs:
    """By id; of the finished no more than `max_kept_jobs` and `max_kept_bytes`."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._jobs: dict[str, Job] = {}  # the finished ones in the order of their ends

    def add(self, job: Job) -> None:
        """A job that was accepted."""
        self._jobs[job.id] = job

    def get(self, job_id: str) -> Job | None:
        """A job, if it is still known."""
        return self._jobs.get(job_id)

    def of(self, owner: str) -> list[Job]:
        """An owner's own, the oldest first."""
        own = [job for job in self._jobs.values() if job.owner == owner]
        return sorted(own, key=lambda job: job.created_at)

    def unfinished(self) -> list[Job]:
        """Those that wait, and those that are drawn."""
        return [job for job in self._jobs.values() if not job.is_finished]

    def finished(self, job: Job) -> None:
        """A job came to its end just now; it stays, so that who waits for it gets it."""
        self._jobs[job.id] = self._jobs.pop(job.id)
        finished = [each for each in self._jobs.values() if each.is_finished]
        num_bytes = sum(each.size_bytes for each in finished)
        num_kept = len(finished)
        for oldest in finished[:-1]:
            too_many = num_kept > self._settings.max_kept_jobs
            if not too_many and num_bytes <= self._settings.max_kept_bytes:
                return
            del self._jobs[oldest.id]
            num_kept, num_bytes = num_kept - 1, num_bytes - oldest.size_bytes

    def forget(self, job_id: str) -> None:
        """Drop a finished job and its images; one that is not finished stays."""
        job = self._jobs.get(job_id)
        if job is not None and job.is_finished:
            del self._jobs[job_id]
