"""What figures need of a learned run's trajectory, in a few kilobytes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lsiq.errors import InputError
from lsiq.results.record import Record


@dataclass(frozen=True)
class Trace:
    """How a run learned.

    Attributes:
        losses: by block, the mean loss of each epoch.
        histograms: of some linears: block, linear, range (the edges are -range and range), before and after: how many
            float and how many trained and rounded weights are in each bin.
        increments: of some linears: block, linear, and by epoch what was added to every so-many-th singular value.
    """

    run_id: str
    model: str
    setting: str
    method: str
    seed: int
    samples: int
    losses: list[list[float]]
    histograms: list[dict[str, Any]]
    increments: list[dict[str, Any]]


def trace(record: Record, folder: Path) -> Trace:
    """Return the trace of a learned run: of its first, middle and last block the first and last linear.

    Raises:
        InputError: the run left no trajectory.
    """
    import pandas

    try:
        rows: Any = pandas.read_parquet(folder / "trajectory.parquet")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no trajectory to read ({error}); only learned methods leave one") from error
    model, setting, method, *_ = record.run_id.rsplit("_", 4)
    blocks = sorted(rows.block.unique())
    linears = list(dict.fromkeys(rows.linear))
    selection = rows[rows.block.isin({blocks[0], blocks[len(blocks) // 2], blocks[-1]})]
    selection = selection[selection.linear.isin({linears[0], linears[-1]})]
    epochs, last = rows[rows.epoch >= 0], selection[selection.epoch < 0]
    losses = [
        [_short(v) for v in group.drop_duplicates("epoch").sort_values("epoch").loss]
        for _, group in epochs.groupby("block")
    ]
    return Trace(
        record.run_id,
        model,
        setting,
        method,
        record.seed,
        record.calibration["samples"],
        losses,
        [_histogram(row) for _, row in last.iterrows()],
        _increments(selection[selection.epoch >= 0]),
    )


def _histogram(row: Any) -> dict[str, Any]:
    counts = {key: [int(count) for count in row[f"histogram_{key}"]] for key in ("before", "after")}
    return {"block": int(row.block), "linear": row.linear, "range": _short(row.histogram_range), **counts}


def _increments(rows: Any) -> list[dict[str, Any]]:
    if "increments" not in rows:
        return []  # a method without singular values
    return [
        {
            "block": int(block),
            "linear": linear,
            "epochs": [[_short(v, 3) for v in values] for values in group.sort_values("epoch").increments],
        }
        for (block, linear), group in rows.groupby(["block", "linear"], sort=False)
    ]


def _short(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def write_trace(content: Trace, folder: Path) -> Path:
    """Write the trace into a file of its own, named after the run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{content.run_id}.json"
    path.write_text(json.dumps(asdict(content), separators=(",", ":")) + "\n", encoding="utf-8")
    return path


def read_traces(folder: Path) -> list[Trace]:
    """Return the traces of a folder, in the order of their names."""
    traces = [Trace(**json.loads(file.read_text(encoding="utf-8"))) for file in sorted(folder.glob("*.json"))]
    # All that are kept under this name are of what is called lsi-corner now.
    return [replace(trace, method="lsi-corner") if trace.method == "lsi" else trace for trace in traces]
