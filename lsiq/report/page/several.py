"""The sections that tell of several runs: all of them, what they trade, and in what they differ."""

from __future__ import annotations

import itertools
import statistics
import string
from collections.abc import Sequence
from typing import Any

from lsiq.errors import InputError
from lsiq.report.differences import side_by_side
from lsiq.report.page.charts import heat_map, intervals, lines, rows_axis
from lsiq.report.page.content import Chart, Figure, Folded, Grid, Heading, Item, Remark, Section, Sheet
from lsiq.report.page.many import MEASURES, all_runs, means, measured, trade, varied
from lsiq.report.page.quality import excess_intervals
from lsiq.report.page.sources import Source
from lsiq.report.page.story import story, trajectory
from lsiq.report.significance import compare
from lsiq.track.panels import Cell, Lines, Table

# Up to this many runs stand side by side, with charts of their own; more are points and rows.
FEW = 8
# Tables with more rows than this can be searched.
_LONG = 20


def comparison(sources: Sequence[Source], level: float) -> tuple[list[Section], list[str]]:
    """Return the sections of several runs, and what is left out of them and why."""
    runs = [source.run for source in sources]
    omitted: list[str] = []
    sections = [Section("Quality and size", trade(sources, omitted))]
    if len(runs) > FEW and (seeds := means(sources)):
        sections.append(Section("Means over seeds", [seeds]))
    sections.append(Section("Runs", [_overview(sources) if len(runs) <= FEW else all_runs(sources)]))
    if len(runs) <= FEW:
        sections += _side_by_side(sources, level, omitted)
        stories = [source for source in sources if source.record is not None]
        items: list[Item] = []
        for letter, source in zip(_letters(sources), sources, strict=True):
            if source.record is None or source.folder is None:
                continue
            chapters, missing = story(source.record, source.folder, level)
            parts: list[Item] = [item for section in chapters for item in (Heading(section.title), *section.items)]
            items.append(Folded(f"{letter}: {source.run.run_id}", [*parts, *(Remark(line) for line in missing)]))
        if stories:
            sections.append(Section("Each run", items))
    else:
        sections.append(Section("Settings that differ", [varied(sources)]))
        omitted.append(
            f"Runs side by side, with paired intervals: a page shows them of up to {FEW} runs; these are {len(runs)}."
        )
    return [section for section in sections if section.items], omitted


def figures(sources: Sequence[Source]) -> list[Figure]:
    """Return how many runs of what there are."""
    kinds = {"models": "model", "formats": "setting", "methods": "method", "seeds": "seed"}
    counts = {name: len({getattr(source.run, field) for source in sources}) for name, field in kinds.items()}
    return [Figure("runs", str(len(sources))), *(Figure(name, str(count)) for name, count in counts.items())]


def _letters(sources: Sequence[Source]) -> str:
    return string.ascii_uppercase[: len(sources)]


def _overview(sources: Sequence[Source]) -> Sheet:
    """The runs in the order in which they were named, each with its letter."""
    keys = measured(sources, ["excess", "kl", "acc"])[:MEASURES]
    columns = ["", "model", "format", "method", "seed", "bits", *keys, "quantised in, s", "peak memory, GiB"]
    rows: list[list[Cell]] = []
    for letter, source in zip(_letters(sources), sources, strict=True):
        run, peaks = source.run, source.record.peak_bytes if source.record else {}
        row: list[Cell] = [letter, run.model, run.setting, run.method, run.seed, run.average_bits]
        memory = max(peaks.values()) / 2**30 if peaks else None
        rows.append([*row, *(run.metrics.get(key) for key in keys), run.seconds, memory])
    return Sheet(Table("runs", columns, rows), f"All {len(rows)} runs")


def _side_by_side(sources: Sequence[Source], level: float, omitted: list[str]) -> list[Section]:
    letters = _letters(sources)
    full = [(source.record, source.folder) for source in sources if source.record and source.folder]
    if len(full) < len(sources):
        omitted.append("Differences: only compact records were kept of some runs; give folders of runs for intervals.")
        return []
    items: list[Item] = [*_paired(full, letters, level)]
    for part in side_by_side(full, level, whole=True):
        if isinstance(part, str):
            items.append(Remark(part))
        elif part.name != "runs":
            items.append(Sheet(part, part.name[0].upper() + part.name[1:], filtered=len(part.rows) > _LONG))
    return [
        Section("Differences", items),
        Section("Errors, learning and time", _overlaid(full, letters, level)),
    ]


def _paired(full: Sequence[tuple[Any, Any]], letters: str, level: float) -> list[Item]:
    """Mean differences against the first run with their intervals, one chart for each measure."""
    rows: dict[str, list[tuple[str, float, float, float]]] = {}
    for letter, (_, folder) in list(zip(letters, full, strict=True))[1:]:
        try:
            differences = compare(full[0][1], folder, level)
        except InputError:
            continue  # said where the tables are
        for difference in differences:
            ends = (difference.mean, difference.low, difference.high)
            rows.setdefault(difference.key, []).append((f"{letter} − A", *ends))
    return (
        [
            Grid(
                [
                    intervals(f"{key}: difference to A, {level:.0%} intervals", points, key)
                    for key, points in rows.items()
                ]
            )
        ]
        if rows
        else []
    )


def _overlaid(full: Sequence[tuple[Any, Any]], letters: str, level: float) -> list[Item]:
    charts: list[Chart] = []
    points = []
    for letter, (record, folder) in zip(letters, full, strict=True):
        for (corpus, prefix), (low, high) in excess_intervals(folder, level).items():
            value = record.metrics.get(f"{prefix}excess/{corpus}")
            if prefix == "" and value is not None:
                points.append((f"{letter} · {corpus}", value, low, high))
    if points:
        charts.append(intervals(f"Excess loss (lower is better), {level:.0%} intervals", points, "nats per token"))
    errors = {
        f"{x}: {r.method}": {b["index"]: b["error"] for b in r.blocks} for x, (r, _) in zip(letters, full, strict=True)
    }
    charts += _family("Error of each block's output", "block", errors, "relative squared error")
    traces = [trajectory(folder) for _, folder in full]
    losses = {f"{x}: {r.method}": _mean_loss(rows) for x, (r, _), rows in zip(letters, full, traces, strict=True)}
    charts += _family("Loss, mean over blocks", "epoch", losses, "loss")
    charts.append(_stages(full, letters))
    items: list[Item] = [Grid(charts)]
    first = _last_errors(traces[0])
    maps = []
    for letter, rows in list(zip(letters, traces, strict=True))[1:]:
        errors = _last_errors(rows)
        ratios = {key: value / error for key, error in first.items() if error and (value := errors.get(key))}
        if ratios:
            maps.append(heat_map(f"Output error, {letter} / A", ratios, "ratio", list(ratios.values())))
    return [*items, Grid(maps)] if maps else items


def _family(title: str, axis: str, series: dict[str, dict[int, float | None]], unit: str) -> list[Chart]:
    measured_lines = {name: line for name, line in series.items() if any(value is not None for value in line.values())}
    x = sorted({place for line in measured_lines.values() for place in line})
    if not x:
        return []
    panel = Lines("", axis, x, {name: [line.get(place) for place in x] for name, line in measured_lines.items()})
    return [lines(panel, title, unit, logarithmic=True)]


def _mean_loss(rows: Sequence[Any]) -> dict[int, float | None]:
    """The mean over blocks of each epoch's loss; every linear of a block has the block's loss."""
    blocks = {
        (row["epoch"], row["block"]): row["loss"] for row in rows if row["epoch"] >= 0 and row["loss"] is not None
    }
    by_epoch = itertools.groupby(sorted(blocks), lambda key: key[0])
    losses = {epoch: [blocks[key] for key in keys] for epoch, keys in by_epoch}
    return {epoch: statistics.fmean(values) for epoch, values in losses.items()}


def _last_errors(rows: Sequence[Any]) -> dict[tuple[int, str], float | None]:
    return {(int(row["block"]), row["linear"]): row["error_after"] for row in rows if row["epoch"] < 0}


def _stages(full: Sequence[tuple[Any, Any]], letters: str) -> Chart:
    names = dict.fromkeys(name for record, _ in full for name, value in record.seconds.items() if value > 0.005)
    runs = [f"{letter}: {record.method}" for letter, (record, _) in zip(letters, full, strict=True)]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": runs,
            "x": [record.seconds.get(name, 0.0) for record, _ in full],
            "hovertemplate": f"{name}: %{{x:.4g}} s",
        }
        for name in names
        if name != "total"
    ]
    layout = {
        "barmode": "stack",
        "xaxis": {"title": {"text": "seconds"}},
        "yaxis": rows_axis(len(runs)),
    }
    alt = "; ".join(
        f"{run}: {record.seconds.get('total', 0):.0f} s" for run, (record, _) in zip(runs, full, strict=True)
    )
    return Chart("Time by stage", f"{alt}.", traces, layout, 160 + 34 * len(runs))
