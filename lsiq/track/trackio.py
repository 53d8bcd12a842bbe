"""trackio: a local store with a dashboard, without account."""

# Not everybody who checks types has it installed; this module would be taken for it.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsiq.errors import OutputError
from lsiq.track.panels import Histograms, Lines, Panel
from lsiq.track.wandb import plain_values

if TYPE_CHECKING:
    from lsiq.results.record import Record
    from lsiq.track.settings import TrackerSettings


class Trackio:
    """One run of trackio per run of ours, in its own store, which `trackio show` reads.

    The steps of a family of lines are the values of its axis. `TRACKIO_DIR` names another store.
    """

    def __init__(self, settings: TrackerSettings, plain: Mapping[str, Any], record: Record, folder: Path) -> None:
        del folder
        self._settings, self._plain = settings, plain
        self._id, self._words = record.run_id, (record.model, record.setting, record.method)
        self._run: Any = None
        self._told = 0

    def open(self, resumed: bool) -> None:
        import trackio

        _quiet()
        if not resumed:
            _forget(self._settings.project, self._id)
        model, setting, method = self._words
        names = {"model": model, "setting": setting, "method": method, "tags": list(self._settings.tags)}
        self._run = trackio.init(
            project=self._settings.project,
            name=self._id,
            group=self._settings.group,
            config={**plain_values(self._plain), "name": names},
            resume="allow" if resumed else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._log(dict(values), step)

    def _log(self, values: dict[str, Any], step: int) -> None:
        self._run.log(values, step=step)
        self._told += 1

    def show(self, panel: Panel, step: int) -> None:
        import numpy as np
        import trackio

        if isinstance(panel, Lines):
            for place, x in enumerate(panel.x):
                row = {f"{panel.name}/{name}": line[place] for name, line in panel.lines.items()}
                self._log({name: value for name, value in row.items() if value is not None}, int(x))
        elif isinstance(panel, Histograms):
            edges = np.asarray(panel.edges)
            both = {"before": panel.before, "after": panel.after}
            shown = {
                f"{panel.name}/{moment}": trackio.Histogram(np_histogram=(np.asarray(counts), edges))
                for moment, counts in both.items()
            }
            self._log(shown, step)
        else:
            table = trackio.Table(columns=list(panel.columns), data=[list(row) for row in panel.rows])
            self._log({panel.name: table}, step)

    def finish(self, record: Record) -> None:
        numbers = {"record/average_bits": record.average_bits}
        numbers |= {f"record/{name}": value for name, value in record.metrics.items() if name.startswith("ppl/")}
        self._log({name: value for name, value in numbers.items() if value is not None}, 0)

    def close(self, failed: bool) -> None:
        if self._run is not None:
            import trackio

            self._log({"status": trackio.Markdown("failed" if failed else "finished")}, 0)
            self._run.finish()
            _check_stored(self._settings.project, self._id, self._told)


def _check_stored(project: str, name: str, told: int) -> None:
    """Raise OutputError unless the store holds all rows of a run: trackio goes on in silence where it cannot write."""
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import TRACKIO_DIR, get_storage_mode

    if get_storage_mode() != "sqlite":
        return  # on a network's file system rows wait in files until the dashboard reads them
    stored = SQLiteStorage.get_log_count(project, name)
    if stored < told:
        raise OutputError(f"{TRACKIO_DIR} holds {stored} of {told} rows; TRACKIO_DIR=DIR names another place")


def _forget(project: str, name: str) -> None:
    """Remove the run of that name: one that begins anew takes its place."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    if SQLiteStorage.get_project_db_path(project).exists():
        for run in trackio.Api().runs(project):
            if run.name == name:
                run.delete()


def _quiet() -> None:
    """Keep trackio's greetings out of the run's table; its warnings go through `warnings` and stay.

    trackio 0.43 has no setting for it.
    """
    import trackio
    import trackio.run
    import trackio.utils

    for module in (trackio, trackio.run, trackio.utils):
        module.print = lambda *_, **__: None
