"""What a run measured, with intervals that say how much of it the text decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lsiq.report.page.charts import intervals
from lsiq.report.page.content import Chart, Item, Sheet
from lsiq.report.significance import BLOCK, FEWEST, block_means, bootstrap_interval
from lsiq.results.record import Record
from lsiq.track.panels import Cell, Table
from lsiq.track.run_panels import accuracies, perplexities

# Columns of windows.parquet and the models that they are of; the empty prefix is the quantised model.
_LOSSES = {"rtn/": "rtn_loss", "prefixed/": "prefixed_loss", "": "loss"}
Interval = tuple[float, float]


def excess_intervals(folder: Path, level: float) -> dict[tuple[str, str], Interval]:
    """Return intervals of the excess loss over the float model, by corpus@length and prefix of the model.

    Windows are pairs of one model's loss and the float model's, drawn in blocks as `lsiq.report.significance` draws
    them. Empty where the run left no windows, or too few.
    """
    import pandas

    try:
        rows: Any = pandas.read_parquet(folder / "windows.parquet")
    except (OSError, ValueError):
        return {}
    known: dict[tuple[str, str], Interval] = {}
    for key, group in rows.groupby("key", sort=False):
        for prefix, column in _LOSSES.items():
            if column not in group or "float_loss" not in group or len(group) < FEWEST:
                continue
            differences = np.asarray(group[column] - group["float_loss"], np.float64)
            if np.isfinite(differences).all():
                known[str(key), prefix] = bootstrap_interval(block_means(differences, BLOCK), level)
    return known


def quality(record: Record, folder: Path, level: float) -> list[Item]:
    """Tables and charts of perplexity, divergence and tasks."""
    known = excess_intervals(folder, level)
    items: list[Item] = []
    if rows := _excesses(record, known):
        items.append(_excess_chart(rows, level))
    texts = perplexities(record)
    if texts.rows:
        prefixes = {record.method: "", "rtn": "rtn/", "prefixed": "prefixed/"}
        ends: list[list[Cell]] = []
        for row in texts.rows:
            pair = known.get((str(row[0]), prefixes.get(str(row[1]), "-")))
            ends.append([None, None] if pair is None else [*pair])
        columns = [*texts.columns[:4], f"excess, low end ({level:.0%})", "high end", *texts.columns[4:]]
        cells = [[*row[:4], *pair, *row[4:]] for row, pair in zip(texts.rows, ends, strict=True)]
        caption = "Perplexity, excess loss over the float model with its interval, and divergence, by text and model"
        items.append(Sheet(Table("texts", columns, cells), caption))
    tasks = accuracies(record)
    if tasks.rows:
        chart = [
            (f"{row[0]} · {row[1]}", value, value - 1.96 * error, value + 1.96 * error)
            for row in tasks.rows
            if isinstance(value := row[2], float) and isinstance(error := row[3], float)
        ]
        if chart:
            items.append(intervals("Tasks, with 1.96 standard errors to either side", chart, "score", zero=False))
        items.append(Sheet(tasks, "Tasks by model, with standard errors"))
    return items


def _excesses(record: Record, known: dict[tuple[str, str], Interval]) -> list[tuple[str, float, float, float]]:
    rows = []
    for (corpus, prefix), (low, high) in known.items():
        value = record.metrics.get(f"{prefix}excess/{corpus}")
        if value is not None:
            rows.append((f"{corpus} · {prefix.rstrip('/') or record.method}", value, low, high))
    return rows


def _excess_chart(rows: list[tuple[str, float, float, float]], level: float) -> Chart:
    title = f"Excess loss over the float model (lower is better), {level:.0%} intervals over the text's windows"
    return intervals(title, rows, "nats per token")
