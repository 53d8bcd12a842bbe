"""The Weights & Biases tracker."""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lsiq.track.console import warn

if TYPE_CHECKING:
    from pandas import DataFrame

    from lsiq.config import RunConfig
    from lsiq.results import Record


class WandbTracker:
    """One W&B run per run of ours: same id, config as plain values, job type = method, group = study.

    Any failure of wandb (not installed, disk, network) is reported once, and the tracker keeps still afterwards.
    """

    def __init__(self, config: RunConfig, plain: Mapping[str, Any], run_id: str, folder: Path) -> None:
        self._settings, self._method = config.tracker, config.method.name
        self._plain, self._id, self._folder = plain, run_id, folder
        self._run: Any = None

    def __enter__(self) -> WandbTracker:
        self._attempt(self._start)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        del error, trace
        if self._run is not None:
            run = self._run
            self._attempt(lambda: run.finish(exit_code=0 if kind is None else 1))

    def log(self, values: Mapping[str, float]) -> None:
        if self._run is not None:
            run = self._run
            self._attempt(lambda: run.log(dict(values)))

    def table(self, name: str, rows: DataFrame) -> None:
        # One table per run: a panel per linear would drown a workspace of hundreds of linears.
        if self._run is not None:
            run = self._run
            self._attempt(lambda: run.log({name: _as_table(rows)}))

    def finish(self, record: Record) -> None:
        if self._run is not None:
            self._attempt(lambda: self._show(record))

    def _start(self) -> None:
        import wandb

        self._folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=self._settings.project,
            id=self._id,
            name=self._id,
            resume="allow",
            group=self._settings.group,
            job_type=self._method,
            tags=self._settings.tags,
            config=dict(self._plain),
            dir=str(self._folder),
            mode=login_mode() if self._settings.mode == "auto" else self._settings.mode,
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )

    def _show(self, record: Record) -> None:
        import wandb

        self._run.summary.update(record.metrics | {"average_bits": record.average_bits})
        rows: list[Any] = [[b["index"], b["error"], b["seconds"], b["average_bits"]] for b in record.blocks]
        self._run.log({"blocks": wandb.Table(columns=["block", "error", "seconds", "bits"], data=rows)})

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except ImportError:
            self._run = None
            warn("tracker=wandb: the package wandb is not installed; the run goes on without it (install lsiq[wandb])")
        except Exception as error:  # whatever a tracker does, the run goes on  # noqa: BLE001
            self._run = None
            warn(f"tracker=wandb failed ({type(error).__name__}: {error}); the run goes on without it")


def _as_table(rows: DataFrame) -> Any:
    import wandb

    shown = rows.map(lambda cell: str(cell) if isinstance(cell, list) else cell)  # cells hold numbers and text only
    return wandb.Table(dataframe=shown)


def login_mode() -> Literal["online", "offline", "disabled"]:
    """`online` where an API key is at hand, else `offline`."""
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return os.environ["WANDB_MODE"]  # type: ignore[return-value]
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return "online" if netrc.netrc().authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"
