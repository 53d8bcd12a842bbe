"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsiq.runtime.signals import variable
from lsiq.runtime.terminal import say, warn
from lsiq.track.panels import Histograms, Lines, Panel

if TYPE_CHECKING:
    from lsiq.results.record import Record
    from lsiq.track.settings import TrackerSettings


# What a run leaves beside its record.
TABLES = ("trajectory.parquet", "windows.parquet", "items.parquet")
# Logged to tell rows apart; none is worth a panel.
COUNTERS = ("block/index", "learn/epoch", "learn/block", "finetune/epoch", "finetune/block")


class Wandb:
    """One W&B run per run of ours, with its id for name, the study for group and the method for job type.

    Single numbers of the record stand in the summary and in tables, not in the history: there each would open a panel.
    """

    def __init__(self, settings: TrackerSettings, plain: Mapping[str, Any], record: Record, folder: Path) -> None:
        self._settings, self._plain, self._folder = settings, plain, folder
        self._id, self._words = record.run_id, (record.model, record.setting, record.method)
        self._run: Any = None

    def open(self, resumed: bool) -> None:
        mode = self._settings.mode
        if mode == "auto" and (environment_mode := os.environ.get("WANDB_MODE")):
            mode = environment_mode
        self._start(self._choose_mode() if mode == "auto" else mode, resumed)
        self._run.define_metric("block/*", step_metric="block/index")
        for name in COUNTERS:
            self._run.define_metric(name, hidden=True)

    def _choose_mode(self) -> str:
        import wandb
        from wandb.errors import AuthenticationError

        offline = "wandb/offline-run-*"
        way_to_send = f"send it later with: wandb sync {self._folder}/{offline}"
        try:
            if wandb.login(prompt=False):
                return "online"
            why = "tracker=wandb: nobody is logged in"
            all_of_them = f"wandb sync {self._folder.parent}/*/{offline}"
            say(
                f"{why}, so the run is tracked offline; {way_to_send}",
                of_all=f"{why}, so runs are tracked offline; send them later with: {all_of_them}",
            )
        except AuthenticationError as error:  # also where the server is out of reach
            why = " ".join(str(error).split())
            warn(f"tracker=wandb: {why}; the run is tracked offline; {way_to_send}")
        return "offline"

    def _start(self, mode: str, resumed: bool) -> None:
        import wandb

        model, setting, method = self._words
        self._run = wandb.init(
            project=self._settings.project,
            id=self._id,
            name=self._id,
            # Without `resume` a run that is there already under this id is overwritten, which is what force=true wants.
            resume="allow" if resumed else None,
            group=self._settings.group,
            job_type=method,
            tags=list(dict.fromkeys([model, setting, *self._settings.tags])),
            config={**plain_values(self._plain), "name": {"model": model, "setting": setting, "method": method}},
            dir=str(self._folder),
            mode=mode,  # type: ignore[arg-type]
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                x_disable_stats=True,
                init_timeout=self._settings.patience,
                finish_timeout=self._settings.patience,
                finish_timeout_raises=True,
            ),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def show(self, panel: Panel, step: int) -> None:
        import numpy as np
        import wandb

        if isinstance(panel, Lines):
            lines = [
                [(x, y) for x, y in zip(panel.x, line, strict=True) if y is not None] for line in panel.lines.values()
            ]
            chart: Any = wandb.plot.line_series(
                xs=[[x for x, _ in line] for line in lines],
                ys=[[y for _, y in line] for line in lines],
                keys=list(panel.lines),
                title=panel.name,
                xname=panel.axis,
            )
        elif isinstance(panel, Histograms):
            before, after = (
                wandb.Histogram(np_histogram=(np.asarray(counts), np.asarray(panel.edges)))
                for counts in (panel.before, panel.after)
            )
            self._run.log({f"{panel.name}/before": before, f"{panel.name}/after": after}, step=step)
            return
        else:
            chart = wandb.Table(columns=list(panel.columns), data=[list(row) for row in panel.rows])
        with self._staging():
            self._run.log({panel.name: chart}, step=step)

    def finish(self, record: Record) -> None:
        costs = {f"seconds/{stage}": seconds for stage, seconds in record.seconds.items()}
        costs |= {f"peak_bytes/{place}": size for place, size in record.peak_bytes.items()}
        self._run.summary.update({**record.metrics, **costs, "average_bits": record.average_bits})
        self._keep("record", [self._folder / "record.json", *(self._folder / name for name in TABLES)])
        self._keep("blocks", sorted((self._folder / "blocks").glob("*.safetensors")))

    def _keep(self, kind: str, files: Sequence[Path]) -> None:
        """Keep files as an artifact; where they are larger than `tracker.upload` allows, their paths."""
        import wandb

        files = [file for file in files if file.exists()]
        if not files:
            return
        # Of what our ids may hold, names of artifacts refuse the plus sign alone.
        artifact = wandb.Artifact(f"{kind}-{self._id.replace('+', '-')}", type=kind)
        small = kind == "record" or sum(file.stat().st_size for file in files) <= self._settings.upload * 2**20
        with self._staging():
            for file in files:
                if small:
                    # Blocks are final and need no copy before they are sent; a later export writes the record again.
                    artifact.add_file(str(file.resolve()), policy="mutable" if kind == "record" else "immutable")
                else:
                    artifact.add_reference(file.resolve().as_uri(), checksum=False)
            self._run.log_artifact(artifact)

    def close(self, failed: bool) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(failed))

    def _staging(self) -> AbstractContextManager[None]:
        """Let files wait inside the run's folder until they are sent, so that it can be synced from another place."""
        return variable("WANDB_DATA_DIR", str((self._folder / "wandb").resolve()))


def plain_values(node: Any) -> Any:
    """Return settings as W&B can filter them: a list that holds groups of settings becomes a group by position."""
    if isinstance(node, Mapping):
        return {str(key): plain_values(value) for key, value in node.items()}
    if isinstance(node, list) and any(isinstance(value, Mapping) for value in node):
        return {str(place): plain_values(value) for place, value in enumerate(node)}
    return node
