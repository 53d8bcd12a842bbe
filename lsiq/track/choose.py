"""The tracker that the settings ask for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsiq.runtime import processes
from lsiq.track.base import Backend, NoTracker, Tracker

if TYPE_CHECKING:
    from lsiq.results.record import Record
    from lsiq.track.settings import TrackerSettings


def make_tracker(
    settings: TrackerSettings, plain: Mapping[str, Any], record: Record, folder: Path, anew: bool
) -> Tracker:
    """Return the tracker that the settings ask for, telling of the run whose `folder` this is.

    Args:
        plain: the run's configuration as plain data.
        anew: whether the run begins again although it was there before.
    """
    if not processes.first() or settings.kind == "none" or settings.mode == "disabled":
        return NoTracker()
    from lsiq.track.background_tracker import BackgroundTracker

    if settings.kind == "wandb":
        from lsiq.track.wandb import Wandb

        backend: Backend = Wandb(settings, plain, record, folder)
    elif settings.kind == "trackio":
        from lsiq.track.trackio import Trackio

        backend = Trackio(settings, plain, record, folder)
    elif settings.kind == "mlflow":
        from lsiq.track.mlflow import MLflow

        backend = MLflow(settings, plain, record, folder)
    else:
        from lsiq.track.tensorboard import TensorBoard

        backend = TensorBoard(settings, plain, record, folder)
    return BackgroundTracker(backend, settings, folder, anew=anew)
