"""The sections that tell of several runs: all of them, what they trade, and in what they differ."""

from __future__ import annotations

import itertools
import json
import statistics
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from lsiq.errors import InputError
from lsiq.report.compact import Run
from lsiq.report.differences import side_by_side
from lsiq.report.page.charts import heat_map, intervals, lines, rows_axis
from lsiq.report.page.content import Chart, Explorer, Figure, Folded, Grid, Heading, Item, Remark, Section, Sheet
from lsiq.report.page.quality import excess_intervals
from lsiq.report.page.sources import Source
from lsiq.report.page.story import story, trajectory
from lsiq.report.runs import value_text
from lsiq.report.significance import compare
from lsiq.track.panels import Cell, Lines, Table

# Up to this many runs stand side by side, with charts of their own; more are points and rows.
FEW = 8
# Columns of the table of all runs are measures that so large a share of them has, and so many at most.
_SHARE, _MEASURES = 0.05, 10
# Tables with more rows than this can be searched.
_LONG = 20


def comparison(sources: Sequence[Source], level: float) -> tuple[list[Section], list[str]]:
    """Return the sections of several runs, and what is left out of them and why."""
    runs = [source.run for source in sources]
    omitted: list[str] = []
    sections = [Section("Quality and size", _trade(sources, omitted))]
    if len(runs) > FEW and (means := _means(sources)):
        sections.append(Section("Means over seeds", [means]))
    sections.append(Section("Runs", [_overview(sources)]))
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
        sections.append(Section("Settings that differ", [_varied(sources)]))
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


def _measured(sources: Sequence[Source], kinds: Sequence[str]) -> list[str]:
    """The measures of some kinds, those that most runs have first."""
    counts = Counter(key for source in sources for key in source.run.metrics if key.partition("/")[0] in kinds)
    order = sorted(counts, key=lambda key: (kinds.index(key.partition("/")[0]), -counts[key], key))
    return [key for key in order if counts[key] >= _SHARE * len(sources)]


def _trade(sources: Sequence[Source], omitted: list[str]) -> list[Item]:
    """Bits against quality."""
    runs = [source.run for source in sources]
    keys = _measured(sources, ["excess", "kl", "ppl"])
    measures = {key: [run.metrics.get(key) for run in runs] for key in keys}
    if not keys or not any(run.average_bits is not None for run in runs):
        omitted.append("Quality and size: the runs have no average bits, or measured no text.")
        return []
    labels = [f"{run.method}, {run.setting}, seed {run.seed}" + (f", {run.study}" if run.study else "") for run in runs]
    bits = [run.average_bits for run in runs]
    return [Explorer([run.model for run in runs], [run.method for run in runs], labels, bits, measures)]


def _overview(sources: Sequence[Source]) -> Sheet:
    keys = _measured(sources, ["excess", "kl", "acc"])[:_MEASURES]
    few = len(sources) <= FEW
    columns = [*([""] if few else []), "model", "format", "method", "seed", "bits", *keys, "quantised in, s"]
    columns += ["peak memory, GiB"] if few else ["study", "set apart by"]
    rows: list[list[Cell]] = []
    special = [""] * len(sources) if few else _special([source.run for source in sources])
    for place, source in enumerate(sources):
        run = source.run
        row: list[Cell] = [*([_letters(sources)[place]] if few else []), run.model, run.setting, run.method, run.seed]
        row += [run.average_bits, *(run.metrics.get(key) for key in keys), run.seconds]
        if few:
            peaks = source.record.peak_bytes if source.record else {}
            row.append(max(peaks.values()) / 2**30 if peaks else None)
        else:
            row += [run.study, special[place]]
        rows.append(row)
    return Sheet(Table("runs", columns, rows), f"All {len(rows)} runs", filtered=not few)


def _means(sources: Sequence[Source]) -> Sheet | None:
    """One row for the runs that differ in nothing but their seeds; None where there are no such runs."""
    keys = _measured(sources, ["excess"])[: _MEASURES // 2]
    groups: dict[str, list[Run]] = {}
    for source in sources:
        run = source.run
        same = json.dumps([run.model, run.setting, run.method, run.study, run.config], sort_keys=True)
        groups.setdefault(same, []).append(run)
    groups = {same: runs for same, runs in groups.items() if len({run.seed for run in runs}) > 1}
    rows: list[list[Cell]] = []
    special = _special([runs[0] for runs in groups.values()])
    for runs, apart in zip(groups.values(), special, strict=True):
        first = runs[0]
        row: list[Cell] = [first.model, first.setting, first.method, first.study, len(runs), first.average_bits]
        for key in keys:
            values = [run.metrics[key] for run in runs if key in run.metrics]
            row += [statistics.fmean(values), statistics.stdev(values)] if len(values) > 1 else [None, None]
        rows.append([*row, apart])
    columns = ["model", "format", "method", "study", "seeds", "bits"]
    columns += [*(name for key in keys for name in (key, "± sd")), "set apart by"]
    caption = "Means and standard deviations of runs that differ in their seeds alone"
    return Sheet(Table("means", columns, rows), caption, filtered=True) if rows else None


def _special(runs: Sequence[Run]) -> list[str]:
    """Say of each run which of its settings are not those that most runs of its model, format and method have."""
    settings = [{key: value_text(value) for key, value in _flat(run.config, "")} for run in runs]
    kinds: dict[tuple[str, str, str], dict[str, Counter[str]]] = {}
    for run, values in zip(runs, settings, strict=True):
        kind = kinds.setdefault((run.model, run.setting, run.method), {})
        for key, value in values.items():
            kind.setdefault(key, Counter())[value] += 1
    usual = {kind: {key: counts.most_common(1)[0][0] for key, counts in keys.items()} for kind, keys in kinds.items()}
    texts = []
    for run, values in zip(runs, settings, strict=True):
        most = usual[run.model, run.setting, run.method]
        texts.append(", ".join(f"{key}={value}" for key, value in values.items() if value != most[key]))
    return texts


def _varied(sources: Sequence[Source]) -> Sheet:
    """The settings that the runs do not share, with their values."""
    values: dict[str, Counter[str]] = {}
    for source in sources:
        for key, value in _flat(source.run.config, ""):
            values.setdefault(key, Counter())[value_text(value)] += 1
    rows: list[list[Cell]] = []
    for key, counts in sorted(values.items()):
        count = sum(counts.values())
        if len(counts) > 1:
            text = ", ".join(f"{value} ({times})" for value, times in counts.most_common(12))
            rows.append([key, text + (", …" if len(counts) > 12 else ""), len(counts), count])
    columns = ["setting", "values, and how often", "values", "runs that have it"]
    return Sheet(Table("settings", columns, rows), "Settings with more than one value", filtered=True)


def _flat(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, list) and any(isinstance(value, dict) for value in node):
        names = [str(value.get("_target_", place)).split(".")[-2:-1] for place, value in enumerate(node)]
        node = {(name or [str(place)])[0]: value for place, (name, value) in enumerate(zip(names, node, strict=True))}
    if not isinstance(node, dict):
        yield key, node
        return
    for name, value in node.items():
        yield from _flat(value, f"{key}.{name}" if key else str(name))


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
    known = {name: line for name, line in series.items() if any(value is not None for value in line.values())}
    x = sorted({place for line in known.values() for place in line})
    if not x:
        return []
    panel = Lines("", axis, x, {name: [line.get(place) for place in x] for name, line in known.items()})
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
