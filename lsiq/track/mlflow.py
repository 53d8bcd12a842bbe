"""MLflow, in a database file below the folder of runs or on a server."""

# Not everybody who checks types has it installed; this module would be taken for it.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsiq.track.panels import Histograms, Lines, Panel
from lsiq.track.wandb import plain_values

if TYPE_CHECKING:
    from lsiq.results.record import Record
    from lsiq.track.settings import TrackerSettings


class MLflow:
    """One run of MLflow per run of ours: losses and lines are metrics, tables and histograms are artifacts.

    The steps of a family of lines are the values of its axis. `MLFLOW_TRACKING_URI` names a server.
    """

    def __init__(self, settings: TrackerSettings, plain: Mapping[str, Any], record: Record, folder: Path) -> None:
        self._settings, self._plain, self._folder = settings, plain, folder.resolve()
        words = {"model": record.model, "setting": record.setting, "method": record.method, "group": settings.group}
        self._tags = {key: value for key, value in words.items() if value} | dict.fromkeys(settings.tags, "")
        self._client: Any = None
        self._run = ""

    def open(self, resumed: bool) -> None:
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        store = self._folder.parent
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store / 'mlflow.db'}"
        self._client = client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(self._settings.project)
        place = None if "MLFLOW_TRACKING_URI" in os.environ else (store / "mlflow").as_uri()
        experiment = found.experiment_id if found else client.create_experiment(self._settings.project, place)
        query = f"attributes.run_name = '{self._folder.name}'"
        earlier = [run.info.run_id for run in client.search_runs([experiment], query)]
        if resumed and earlier:
            self._run = earlier[0]
            client.update_run(self._run, "RUNNING")
            return
        for run in earlier:  # one that begins anew takes its place
            client.delete_run(run)
        self._run = client.create_run(experiment, run_name=self._folder.name, tags=self._tags).info.run_id
        client.log_dict(self._run, plain_values(self._plain), "config.json")

    def log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [Metric(name_of(key), value, now, step) for key, value in values.items()])

    def show(self, panel: Panel, step: int) -> None:
        del step
        if isinstance(panel, Lines):
            for place, x in enumerate(panel.x):
                row = {f"{panel.name}/{name}": line[place] for name, line in panel.lines.items()}
                self.log({key: value for key, value in row.items() if value is not None}, int(x))
            return
        file = f"{name_of(panel.name)}.json"
        if isinstance(panel, Histograms):
            counts = {"edges": list(panel.edges), "before": list(panel.before), "after": list(panel.after)}
            self._client.log_dict(self._run, counts, file)
        elif panel.rows:
            columns = map(list, zip(*panel.rows, strict=True))
            self._client.log_table(self._run, dict(zip(panel.columns, columns, strict=True)), file)

    def finish(self, record: Record) -> None:
        numbers = {**record.metrics, "average_bits": record.average_bits}
        self.log({key: value for key, value in numbers.items() if value is not None}, 0)
        self._client.log_artifact(self._run, str(self._folder / "record.json"))

    def close(self, failed: bool) -> None:
        if self._run:
            self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


def name_of(key: str) -> str:
    """Return a name that MLflow takes: letters, digits, blanks and a few marks."""
    return re.sub(r"[^\w\-. :/]", "-", key)
