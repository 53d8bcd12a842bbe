"""What a tracker is, and the choice of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lsiq.results.record import Record
    from lsiq.track.panels import Panel


class Tracker(Protocol):
    """Mirrors a run while it lasts. A tracker that fails costs a warning, never the run."""

    def __enter__(self) -> Tracker: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def log(self, values: Mapping[str, float]) -> None:
        """Add one row of named numbers."""
        ...

    def show(self, panels: Iterable[Panel]) -> None:
        """Show line families, histograms and tables."""
        ...

    def finish(self, record: Record) -> None:
        """Show the finished record, and keep it with what the run learned."""
        ...


class Backend(Protocol):
    """What a tracker does with what it is told; `lsiq.track.background_tracker` answers where it raises or hangs.

    Steps count the rows of a run and go on where an interrupted run stopped.
    """

    def open(self, resumed: bool) -> None:
        """Begin, or go on with the run of the same name."""
        ...

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def show(self, panel: Panel, step: int) -> None: ...

    def finish(self, record: Record) -> None: ...

    def close(self, failed: bool) -> None:
        """Leave everything written; `failed` says that the run was not finished."""
        ...


class NoTracker:
    """Keeps nothing; the record is written all the same."""

    def __enter__(self) -> NoTracker:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        return None

    def log(self, values: Mapping[str, float]) -> None:
        del values

    def show(self, panels: Iterable[Panel]) -> None:
        del panels

    def finish(self, record: Record) -> None:
        del record
