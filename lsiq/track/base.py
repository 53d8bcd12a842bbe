"""What a tracker is, and the choice of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from lsiq import distributed

if TYPE_CHECKING:
    from lsiq.config import TrackerSettings
    from lsiq.results import Record
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
    """What a tracker does with what it is told; it may raise or hang, which `lsiq.track.mirror` answers for.

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


def make_tracker(
    settings: TrackerSettings, plain: Mapping[str, Any], record: Record, folder: Path, anew: bool
) -> Tracker:
    """Return the tracker that the settings ask for, telling of the run whose `folder` this is.

    Args:
        plain: the run's configuration as plain data.
        anew: whether the run begins again although it was there before.
    """
    if not distributed.first() or settings.kind == "none" or settings.mode == "disabled":
        return NoTracker()
    from lsiq.track.mirror import Mirror

    if settings.kind == "wandb":
        from lsiq.track.wandb import Wandb

        backend: Backend = Wandb(settings, plain, record, folder)
    else:
        from lsiq.track.tensorboard import TensorBoard

        backend = TensorBoard(settings, plain, record, folder)
    return Mirror(backend, settings, folder, anew=anew)
