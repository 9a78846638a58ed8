"""Who comes next: owners in turn, and each owner's jobs in their order."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flux_nf4.server.jobs import Job


class FairQueue:
    """Waiting jobs. With `k` owners waiting, each has one of any `k` places in a row.

    A job that lost its worker goes before all others: it has waited its turn already.
    """

    def __init__(self) -> None:
        self._again: deque[Job] = deque()
        self._by_owner: OrderedDict[str, deque[Job]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._again) + sum(len(jobs) for jobs in self._by_owner.values())

    def __iter__(self) -> Iterator[Job]:
        """All jobs in the order in which they will come, if every owner may run."""
        yield from self._again
        waiting = [iter(jobs) for jobs in self._by_owner.values()]
        while waiting:
            still = []
            for jobs in waiting:
                job = next(jobs, None)
                if job is not None:
                    yield job
                    still.append(jobs)
            waiting = still

    def is_full(self, owner: str, size: int) -> bool:
        """Whether an owner may put no more into a queue that is to hold `size` jobs.

        Beyond that only owners who have less than their share of it may: nobody can fill it for
        all others. With `n` owners it grows to `size` times 1 + 1/2 + ... + 1/n.
        """
        if len(self) < size:
            return False
        num_owners = len(self._by_owner) + (owner not in self._by_owner)
        return len(self._by_owner.get(owner, ())) >= size // num_owners

    def push(self, job: Job) -> None:
        """Put a new job behind its owner's others."""
        self._by_owner.setdefault(job.owner, deque()).append(job)

    def push_again(self, job: Job) -> None:
        """Put a job that was begun already before all that were not."""
        self._again.append(job)

    def pop(self, may_run: Callable[[str], bool]) -> Job | None:
        """Take the next job whose owner may run one; None when there is none."""
        for job in self._again:
            if may_run(job.owner):
                self._again.remove(job)
                return job
        for owner, jobs in self._by_owner.items():
            if may_run(owner):
                job = jobs.popleft()
                if jobs:
                    self._by_owner.move_to_end(owner)
                else:
                    del self._by_owner[owner]
                return job
        return None

    def remove(self, job: Job) -> None:
        """Take out a job that waits."""
        if job in self._again:
            self._again.remove(job)
            return
        jobs = self._by_owner[job.owner]
        jobs.remove(job)
        if not jobs:
            del self._by_owner[job.owner]
