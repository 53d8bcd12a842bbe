"""The panels of a run, made from its trajectory and its record: the same for every tracker."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from lsiq.track.panels import Cell, Histograms, Lines, Panel, Table, spread

if TYPE_CHECKING:
    from lsiq.results.record import Record


Row: TypeAlias = Mapping[str, Any]

# Lines that can be told apart in one panel.
LINES = 8


def trajectory_panels(rows: Sequence[Row], limit: int) -> Iterator[Panel]:
    """Yield the panels of a run's trajectory; their number does not grow with the model.

    Args:
        rows: of `trajectory.parquet`; see `lsiq.learning.trajectory` and `lsiq.pipeline.layer_report`.
        own: how many linears get panels of their own.
    """
    last = [row for row in rows if row["epoch"] < 0]
    layers = panel_layers(last, limit)
    if epochs := [row for row in rows if row["epoch"] >= 0]:
        yield from _learning(epochs, layers)
    for column, title in (
        ("error_before", "output error, rounded to nearest"),
        ("error_after", "output error"),
        ("flip_rate", "flipped codes"),
    ):
        lines = {row["linear"]: [_number(r[column]) for r in last if r["linear"] == row["linear"]] for row in last}
        if any(value is not None for line in lines.values() for value in line):
            yield Lines(f"layers/{title}", "block", sorted({row["block"] for row in last}), lines)
    for row in layers:
        before, reach = row["histogram_before"], row["histogram_range"]
        edges = [reach * (2 * place / len(before) - 1) for place in range(len(before) + 1)]
        yield Histograms(f"weights/{_layer(row)}", edges, before, row["histogram_after"])
        before = row["histogram_codes_before"]
        edges = [level - 0.5 for level in range(len(before) + 1)]
        yield Histograms(f"codes/{_layer(row)}", edges, before, row["histogram_codes"])
    columns = ["block", "linear", "error_before", "error_after", "flip_rate"]
    cells = [[row["block"], row["linear"], *(_number(row[name]) for name in columns[2:])] for row in last]
    yield Table("tables/layers", columns, cells)


def panel_layers(last: Sequence[Row], limit: int) -> list[Row]:
    """Return the linears with panels of their own: from the first block's first diagonally to the last block's last.

    Args:
        last: one row per linear, in the order of the network.
    """
    blocks = [list(rows) for _, rows in itertools.groupby(last, lambda row: row["block"])]
    by_layer = {}
    for place in range(limit if blocks else 0):
        at = place / max(limit - 1, 1)
        rows = blocks[round(at * (len(blocks) - 1))]
        row = rows[round(at * (len(rows) - 1))]
        by_layer[_layer(row)] = row
    return list(by_layer.values())


def _learning(epochs: Sequence[Row], layers: Sequence[Row]) -> Iterator[Lines]:
    """Losses by block, gradient norms by linear, and the singular values of each chosen linear, over the epochs."""
    losses: dict[str, dict[int, float]] = {}
    for row in epochs:
        losses.setdefault(f"block {row['block']}", {})[row["epoch"]] = row["loss"]
    names = list(losses)
    yield _family("learning/loss", {names[index]: losses[names[index]] for index in spread(len(names), LINES)})
    by_layer = {_layer(row): [epoch for epoch in epochs if _layer(epoch) == _layer(row)] for row in layers}
    norms = {name: {row["epoch"]: row["gradient_norm"] for row in rows} for name, rows in by_layer.items() if rows}
    if norms:
        yield _family("learning/gradient norm", norms)
    for name, rows in by_layer.items():
        values = {row["epoch"]: row["values"] for row in rows if "values" in row}
        if values:
            places = spread(len(next(iter(values.values()))), LINES)
            lines = {f"value {place}": {epoch: row[place] for epoch, row in values.items()} for place in places}
            yield _family(f"singular values/{name}", lines)


def _family(name: str, lines: Mapping[str, Mapping[int, float]]) -> Lines:
    x = sorted({epoch for line in lines.values() for epoch in line})
    return Lines(name, "epoch", x, {key: [_number(line.get(epoch)) for epoch in x] for key, line in lines.items()})


def _layer(row: Row) -> str:
    return f"block {row['block']} {row['linear']}"


def record_panels(record: Record) -> Iterator[Table]:
    """Yield the tables of a record: perplexities, tasks, blocks, time and memory."""
    yield perplexities(record)
    if (table := accuracies(record)).rows:
        yield table
    if record.blocks:
        columns = ["block", "error", "loss first", "loss last", "seconds", "bits"]
        yield Table("tables/blocks", columns, [_block(row) for row in record.blocks])
    yield costs(record)


def variants(record: Record) -> list[str]:
    """Return the prefixes of the models that were measured, the quantised one, `""`, last."""
    return [p for p in ("float/", "rtn/", "prefixed/") if any(k.startswith(p) for k in record.metrics)] + [""]


def perplexities(record: Record) -> Table:
    """Perplexity, excess and divergence by corpus and model."""
    keys = [key.removeprefix("ppl/") for key in record.metrics if key.startswith("ppl/")]
    rows: list[Sequence[Cell]] = []
    for key in keys:
        for prefix in variants(record):
            values = [record.metrics.get(f"{prefix}{name}/{key}") for name in ("ppl", "excess", "kl", "top1")]
            rows.append([key, prefix.rstrip("/") or record.method, *values])
    return Table("tables/perplexity", ["corpus", "model", "perplexity", "excess", "kl", "top-1 agreement"], rows)


def accuracies(record: Record) -> Table:
    """What was measured on tasks, by metric and model, with standard errors."""
    keys = [key for key, facts in record.protocol.items() if "task_version" in facts]
    rows: list[Sequence[Cell]] = []
    for key in keys:
        metric, _, task = key.partition("/")
        for prefix in variants(record):
            error = record.metrics.get(f"{prefix}{metric}_stderr/{task}")
            rows.append([key, prefix.rstrip("/") or record.method, record.metrics.get(f"{prefix}{key}"), error])
    return Table("tables/tasks", ["task", "model", "value", "standard error"], rows)


def costs(record: Record) -> Table:
    """Seconds by stage, peak memory and bits."""
    rows: list[Sequence[Cell]] = [
        [f"seconds {stage}", seconds] for stage, seconds in record.seconds.items() if seconds > 0.005
    ]
    rows += [[f"peak {place} memory, GiB", size / 2**30] for place, size in record.peak_bytes.items()]
    return Table("tables/time and memory", ["what", "value"], [*rows, ["average bits", record.average_bits]])


def _block(row: Row) -> list[Cell]:
    metrics = row["metrics"]
    learned = [metrics.get("loss_first"), metrics.get("loss_last")]
    return [row["index"], row["error"], *learned, row["seconds"], row["average_bits"]]


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
