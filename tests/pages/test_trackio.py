"""A run tracked by trackio is read back from trackio's own store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from omegaconf import DictConfig

from lsiq.results.record import Record, read_record

pytest.importorskip("trackio", reason="tracker=trackio needs trackio (the extra trackio)")
SmallRun = Callable[..., DictConfig]

RUN = """
import json, sys
from helpers.configuration import compose_run
from lsiq.experiment.run import run
run(compose_run(*json.loads(sys.argv[1])))
"""
READ = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage as store
names = store.get_runs("lsiq")
told = {
    name: {"rows": store.get_logs("lsiq", name), "config": store.get_run_config("lsiq", name)} for name in names
}
print(json.dumps(told, default=str))
"""


def call(store: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a store of its own: trackio reads its place when it is imported."""
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRACKIO_DIR": str(store), "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)


def tracked(store: Path, runs: Path, model: Path, text: Path, *more: str) -> tuple[Record, str]:
    overrides = [
        *(f"model.path={model}", "calib=file", f"calib.path={text}", "calib.samples=4", "calib.seqlen=32"),
        *("eval=file", f"eval.path={text}", "eval.seqlen=64", "quant.weight.group=32", f"paths.runs={runs}"),
        *("tracker=trackio", "tracker.group=study", "tracker.tags=[first]", *more),
    ]
    done = call(store, RUN, json.dumps(overrides))
    assert done.returncode == 0, done.stderr
    (record,) = [found for file in runs.glob("*/record.json") if (found := read_record(file.parent))]
    return record, done.stdout + done.stderr


def read_back(store: Path) -> dict[str, Any]:
    done = call(store, READ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def series(rows: list[dict[str, Any]], name: str) -> dict[int, Any]:
    return {row["step"]: row[name] for row in rows if name in row}


@pytest.mark.slow
def test_the_store_holds_names_losses_errors_tables_and_histograms(
    checkpoints: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    learned = ("method=lsi-corner", "method.training.epochs=2", "method.parts.0.corner=8")
    record, printed = tracked(tmp_path / "store", tmp_path / "runs", checkpoints["llama"], text_file, *learned)
    assert "trackio" not in printed.lower()
    (name, told), *others = read_back(tmp_path / "store").items()
    assert (name, others) == (record.run_id, [])
    config, rows = told["config"], told["rows"]
    assert config["name"] == {"model": "llama", "setting": record.setting, "method": "lsi-corner", "tags": ["first"]}
    assert (config["_Group"], config["quant"]["weight"]["group"]) == ("study", 32)
    frame = pandas.read_parquet(tmp_path / "runs" / record.run_id / "trajectory.parquet")
    losses = frame[(frame["epoch"] >= 0) & (frame["block"] == 1)].drop_duplicates("epoch")
    assert series(rows, "learning/loss/block 1") == dict(zip(losses["epoch"], losses["loss"], strict=True))
    last = frame[(frame["epoch"] < 0) & (frame["linear"] == "self_attn.q_proj")].set_index("block")
    assert series(rows, "layers/flipped codes/self_attn.q_proj") == last["flip_rate"].to_dict()
    (after,) = series(rows, "weights/block 0 self_attn.q_proj/after").values()
    assert after["values"] == list(last.loc[0, "histogram_after"])
    (table,) = series(rows, "tables/blocks").values()
    assert [row["error"] for row in table["_value"]] == [block["error"] for block in record.blocks]
    assert series(rows, "record/ppl/file@64") == {0: record.metrics["ppl/file@64"]}
    assert [block["error"] for block in record.blocks] == list(series(rows, "block/error").values())
    assert series(rows, "status")[0]["_value"] == "finished"


@pytest.mark.product
def test_a_run_that_begins_anew_takes_the_place_of_the_old_one(
    checkpoints: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    for more in ((), ("force=true",)):
        tracked(tmp_path / "store", tmp_path / "runs", checkpoints["llama"], text_file, "method=rtn", *more)
        (told,) = read_back(tmp_path / "store").values()
        assert len([row for row in told["rows"] if "block/error" in row]) == 2


@pytest.mark.slow
def test_a_store_that_cannot_be_written_costs_one_line(
    checkpoints: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "store").write_text("a file, where a folder should be")
    record, printed = tracked(tmp_path / "store", tmp_path / "runs", checkpoints["llama"], text_file, "method=rtn")
    assert record.status == "finished"
    assert printed.count("warning: tracker=trackio failed") == 1
    assert "Traceback" not in printed


RESUMED = """
from pathlib import Path
from lsiq.results.record import Record
from lsiq.track.settings import TrackerSettings
from lsiq.track.trackio import Trackio
record = Record("m_w3a16_rtn_s0_0", "running", "2026-01-01", {}, 0, {})
for resumed in (False, True):
    backend = Trackio(TrackerSettings(kind="trackio"), {}, record, Path())
    backend.open(resumed)
    backend.log({"loss": 1.0}, int(resumed))
    backend.close(failed=not resumed)
"""


def test_a_resumed_run_goes_on_in_the_run_of_its_name(tmp_path: Path) -> None:
    done = call(tmp_path, RESUMED)
    assert done.returncode == 0, done.stderr
    ((name, told),) = read_back(tmp_path).items()
    assert name == "m_w3a16_rtn_s0_0"
    assert series(told["rows"], "loss") == {0: 1.0, 1: 1.0}
    assert [row["status"]["_value"] for row in told["rows"] if "status" in row] == ["failed", "finished"]
