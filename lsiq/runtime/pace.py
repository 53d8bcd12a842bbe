"""How often something is written to the disk that only saves work."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

# Writing takes at most about a tenth of the time.
TIMES_WRITING = 10.0


class Pace:
    """When something was last written, and how long that took."""

    def __init__(self) -> None:
        self._written, self._took = time.monotonic(), 0.0

    def due(self, seconds: float) -> bool:
        """Whether it should be written again: after so many seconds, or after ten times what writing took."""
        return time.monotonic() - self._written >= max(seconds, TIMES_WRITING * self._took)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """While this lasts it is written; what fails does not count."""
        start = time.monotonic()
        yield
        self._written = time.monotonic()
        self._took = self._written - start
