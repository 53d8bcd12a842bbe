"""A run tracked by MLflow is read back from MLflow's own database."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from omegaconf import DictConfig

from lsiq.experiment.run import run

pytest.importorskip("mlflow", reason="tracker=mlflow needs mlflow (the extra mlflow)")
SmallRun = Callable[..., DictConfig]
LEARNED = ("method=lsi-corner", "method.training.epochs=2", "method.parts.0.corner=8")


def read_back(runs: Path) -> tuple[Any, list[Any]]:
    """MLflow's client and the runs of the project."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{runs / 'mlflow.db'}")
    return client, list(client.search_runs([client.get_experiment_by_name("lsiq").experiment_id]))


def test_the_database_holds_names_losses_errors_tables_and_histograms(
    checkpoints: dict[str, Path], small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    record = run(small_run(checkpoints["llama"], "tracker=mlflow", "tracker.group=study", *LEARNED))
    client, (tracked,) = read_back(tmp_path / "runs")
    assert (tracked.info.run_name, tracked.info.status) == (record.run_id, "FINISHED")
    assert tracked.data.tags["group"] == "study"
    assert tracked.data.tags["method"] == "lsi-corner"
    assert tracked.data.metrics["ppl/file-64"] == record.metrics["ppl/file@64"]

    def series(name: str) -> dict[int, float]:
        return {point.step: point.value for point in client.get_metric_history(tracked.info.run_id, name)}

    folder = tmp_path / "runs" / record.run_id
    frame: Any = pandas.read_parquet(folder / "trajectory.parquet")
    losses = frame[(frame["epoch"] >= 0) & (frame["block"] == 1)].drop_duplicates("epoch")
    assert series("learning/loss/block 1") == dict(zip(losses["epoch"], losses["loss"], strict=True))
    last = frame[(frame["epoch"] < 0) & (frame["linear"] == "self_attn.q_proj")].set_index("block")
    assert series("layers/flipped codes/self_attn.q_proj") == last["flip_rate"].to_dict()
    place = Path(client.download_artifacts(tracked.info.run_id, "", str(tmp_path)))
    counts = json.loads((place / "weights" / "block 0 self_attn.q_proj.json").read_text())
    assert counts["after"] == list(last.loc[0, "histogram_after"])
    table = json.loads((place / "tables" / "blocks.json").read_text())
    errors = [row[table["columns"].index("error")] for row in table["data"]]
    assert errors == pytest.approx([row["error"] for row in record.blocks], rel=1e-8)  # MLflow keeps ten digits
    assert json.loads((place / "record.json").read_text())["run_id"] == record.run_id
    run(small_run(checkpoints["llama"], "tracker=mlflow", "force=true", *LEARNED))
    _, (anew,) = read_back(tmp_path / "runs")
    assert anew.info.run_id != tracked.info.run_id
