"""W&B is told the truth: a run is tracked offline for real and read back from what was written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest
from omegaconf import DictConfig

from lsiq.run import run
from lsiq.track.wandb import login_mode

pytest.importorskip("wandb")


def read_back(folder: Path) -> dict[str, object]:
    """The run as wandb's own reader shows it."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--summary", "--json", str(file)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_an_offline_run_holds_config_and_metrics(
    checkpoint: Path, small_run: Callable[..., DictConfig], tmp_path: Path
) -> None:
    record = run(small_run(checkpoint, "tracker=wandb", "tracker.mode=offline", "tracker.group=study"))
    told = json.dumps(read_back(tmp_path / "runs" / record.run_id))
    assert record.run_id in told
    assert "ppl/file@64" in told
    assert str(record.metrics["ppl/file@64"])[:8] in told


def test_trajectories_are_stored_with_the_run_and_sent_to_the_tracker(
    checkpoint: Path, small_run: Callable[..., DictConfig], tmp_path: Path
) -> None:
    overrides = ("method=lsi", "method.training.epochs=2", "method.parts.0.corner=8", "tracker=wandb")
    record = run(small_run(checkpoint, *overrides, "tracker.mode=offline"))
    folder = tmp_path / "runs" / record.run_id
    rows = pandas.read_parquet(folder / "trajectory.parquet")
    assert set(rows["epoch"]) == {-1, 0, 1}
    assert set(rows["block"]) == {0, 1}
    trained, last = rows[rows["epoch"] == 1], rows[rows["epoch"] == -1]
    assert (trained["increment_norm"] > 0).all()
    assert (trained["gradient_norm"] > 0).all()
    assert trained["values"].map(len).max() <= 64
    assert last["flip_rate"].between(0, 1).all()
    for _, row in last.iterrows():
        assert sum(row["histogram_codes"]) == sum(row["histogram_after"]) == sum(row["histogram_before"])
    assert "trajectory" in json.dumps(read_back(folder))
    assert (tmp_path / "runs" / record.run_id / "wandb").is_dir()


def test_a_tracker_that_cannot_start_costs_a_warning_only(
    checkpoint: Path,
    small_run: Callable[..., DictConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "")
    record = run(small_run(checkpoint, "tracker=wandb", "tracker.mode=online"))
    assert record.status == "finished"
    assert "the run goes on without it" in " ".join(capsys.readouterr().err.split())


def test_without_a_login_runs_are_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert login_mode() == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert login_mode() == "online"
