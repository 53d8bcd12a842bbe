"""Many runs as points and as rows: what they trade, how they rank, and in what they differ."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lsiq.report.compact import Run
from lsiq.report.page.content import Explorer, Item, Sheet
from lsiq.report.page.sources import Source
from lsiq.report.runs import value_text
from lsiq.track.panels import Cell, Table

# Columns of the table of all runs are measures that so large a share of them has, and so many at most.
_SHARE, MEASURES = 0.05, 10


def measured(sources: Sequence[Source], kinds: Sequence[str]) -> list[str]:
    """The measures of some kinds, those that most runs have first."""
    counts = Counter(key for source in sources for key in source.run.metrics if key.partition("/")[0] in kinds)
    order = sorted(counts, key=lambda key: (kinds.index(key.partition("/")[0]), -counts[key], key))
    return [key for key in order if counts[key] >= _SHARE * len(sources)]


def trade(sources: Sequence[Source], omitted: list[str]) -> list[Item]:
    """Bits against quality."""
    runs = [source.run for source in sources]
    keys = measured(sources, ["excess", "kl", "ppl"])
    measures = {key: [run.metrics.get(key) for run in runs] for key in keys}
    if not keys or not any(run.average_bits is not None for run in runs):
        omitted.append("Quality and size: the runs have no average bits, or measured no text.")
        return []
    named = _named(runs)
    labels = [
        f"{name}, {run.setting}, seed {run.seed}" + (f", {run.study}" if run.study else "")
        for name, run in zip(named, runs, strict=True)
    ]
    bits = [run.average_bits for run in runs]
    return [Explorer([run.model for run in runs], [run.method for run in runs], labels, bits, measures)]


def all_runs(sources: Sequence[Source]) -> Sheet:
    """The runs by model and format, the best first."""
    runs, keys = [source.run for source in sources], measured(sources, ["excess", "kl", "acc"])[:MEASURES]
    columns = ["method", "format", "model", "seed", "bits", *keys, "quantised in, s", "study"]
    rows: list[list[Cell]] = []
    for name, run in sorted(zip(_named(runs), runs, strict=True), key=_rank(runs, keys)):
        row: list[Cell] = [name, run.setting, run.model, run.seed, run.average_bits]
        rows.append([*row, *(run.metrics.get(key) for key in keys), run.seconds, run.study])
    return Sheet(Table("runs", columns, rows), f"All {len(rows)} runs", filtered=True, names=2)


def _rank(runs: Sequence[Run], keys: Sequence[str]) -> Callable[[tuple[str, Run]], tuple[Any, ...]]:
    """What sorts runs by model and format, those of most runs first, and by the first measure."""
    models, formats = Counter(run.model for run in runs), Counter(run.setting for run in runs)

    def place(named: tuple[str, Run]) -> tuple[Any, ...]:
        run = named[1]
        value = run.metrics.get(keys[0]) if keys else None
        order = (
            -models[run.model],
            run.model,
            -formats[run.setting],
            run.setting,
            math.inf if value is None else value,
        )
        return (*order, run.method, run.seed)

    return place


def means(sources: Sequence[Source]) -> Sheet | None:
    """One row for the runs that differ in nothing but their seeds; None where there are no such runs."""
    keys = measured(sources, ["excess"])[: MEASURES // 2]
    alike: dict[str, list[Run]] = {}
    for source in sources:
        run = source.run
        same = json.dumps([run.model, run.setting, run.method, run.study, run.config], sort_keys=True)
        alike.setdefault(same, []).append(run)
    groups = {id(runs[0]): runs for runs in alike.values() if len({run.seed for run in runs}) > 1}
    firsts = [runs[0] for runs in groups.values()]
    rows: list[list[Cell]] = []
    for name, first in sorted(zip(_named(firsts), firsts, strict=True), key=_rank(firsts, keys)):
        runs = groups[id(first)]
        row: list[Cell] = [name, first.setting, first.model, len(runs), first.average_bits]
        for key in keys:
            values = [run.metrics[key] for run in runs if key in run.metrics]
            row += [statistics.fmean(values), statistics.stdev(values)] if len(values) > 1 else [None, None]
        rows.append([*row, first.study])
    columns = ["method", "format", "model", "seeds", "bits"]
    columns += [*(name for key in keys for name in (key, "± sd")), "study"]
    caption = "Means and standard deviations of runs that differ in their seeds alone"
    return Sheet(Table("means", columns, rows), caption, filtered=True, names=2) if rows else None


def _named(runs: Sequence[Run]) -> list[str]:
    """Each run's method, and the settings that most runs of its model, format and method do not share."""
    return [", ".join(filter(None, (run.method, apart))) for run, apart in zip(runs, _special(runs), strict=True)]


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


def varied(sources: Sequence[Source]) -> Sheet:
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
