"""What a tracker is, and the choice of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from lsiq import distributed

if TYPE_CHECKING:
    from pandas import DataFrame

    from lsiq.config import RunConfig
    from lsiq.results import Record


class Tracker(Protocol):
    """Mirrors a run while it lasts. A tracker that fails costs a warning, never the run."""

    def __enter__(self) -> Tracker: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def log(self, values: Mapping[str, float]) -> None:
        """Add one row of named numbers."""
        ...

    def table(self, name: str, rows: DataFrame) -> None:
        """Show a table, such as the trajectories of a learned run."""
        ...

    def finish(self, record: Record) -> None:
        """Show the finished record."""
        ...


class NoTracker:
    """Keeps nothing; the record is written all the same."""

    def __enter__(self) -> NoTracker:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        return None

    def log(self, values: Mapping[str, float]) -> None:
        del values

    def table(self, name: str, rows: DataFrame) -> None:
        del name, rows

    def finish(self, record: Record) -> None:
        del record


def make_tracker(config: RunConfig, plain: Mapping[str, Any], run_id: str, folder: Path) -> Tracker:
    """Return the tracker that the settings ask for."""
    if not distributed.first() or config.tracker.kind == "none" or config.tracker.mode == "disabled":
        return NoTracker()
    from lsiq.track.wandb import WandbTracker

    return WandbTracker(config, plain, run_id, folder)
