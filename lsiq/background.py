"""One job at a time that goes on beside its caller."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Carries out jobs in a thread of its own. A process does not end before its last job has."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._job: Future[object] | None = None

    @property
    def busy(self) -> bool:
        return self._job is not None and not self._job.done()

    def start(self, job: Callable[[], object]) -> None:
        """Begin a job once the last one is over; raises what that one raised."""
        self.wait()
        self._job = self._thread.submit(job)

    def wait(self) -> None:
        """Return when the last job is over; raises what it raised, once."""
        job, self._job = self._job, None
        if job is not None:
            job.result()
