"""What methods lose on models of several sizes, as tables and a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from lsiq.tables.figure import Figure, legend_below, looks, on_lower_edge, panels, plain_numbers
from lsiq.tables.papers.model_sizes import TEXTS
from lsiq.tables.papers.size_runs import ENTRIES, Entry, SizeRuns
from lsiq.tables.study import Sample
from lsiq.tables.table import DASH, Cell, Row, Table, decimals


def excess_by_size(runs: SizeRuns, widths: Sequence[str]) -> Figure:
    """Draw excess against size: a row of panels per width, a panel per text; a line per method joins own models."""
    canvas, axes = panels(len(widths), len(TEXTS), 3.1, sharex=True, sharey="row")
    sizes = sorted((size for size in runs.sizes if size.tick), key=lambda size: not size.own)
    own = sum(size.own for size in sizes)
    drawn = {point.entry for point in runs.points if point.size in [size.name for size in sizes]}
    entries = [entry for entry in ENTRIES if entry.look is not None and entry.name in drawn]
    places = [(width, text) for width in widths for text in TEXTS]
    counts: list[int] = []
    for axis, (width, text) in zip(axes, places, strict=True):
        for place, entry in enumerate(entries):
            shift = (place - (len(entries) - 1) / 2) * 0.8 / len(entries)
            samples = [runs.sample(size.name, width, entry.name, f"excess/{text}") for size in sizes]
            counts += [len(sample.values) for sample in samples if sample is not None]
            _draw(axis, entry, samples, shift, own)
        plain_numbers(axis)
        axis.set_xticks(range(len(sizes)), [size.tick for size in sizes])
        axis.set_xlim(-0.5, len(sizes) - 0.5)
        axis.grid(False, axis="x")
        for border in range(1, len(sizes)):
            axis.axvline(border - 0.5, color="#e5e5e5", linewidth=0.6)
        axis.set_title(f"{width[1:]} bits, {TEXTS[text]}")
        if text == next(iter(TEXTS)):
            axis.set_ylabel("excess loss (nats)")
    legend_below(canvas, axes, [entry.name for entry in entries], columns=4)
    caption = (
        f"Excess loss against model size: means over {min(counts)} to {max(counts)} runs, which small markers show one "
        "by one; lines join models of one recipe, of which 11 M saw 420 M tokens of more text and the others 100 M; "
        "hollow: variants, and AutoRound's package"
    )
    return Figure("excess-by-size", caption, canvas)


def _draw(axis: Axes, entry: Entry, samples: Sequence[Sample | None], shift: float, own: int) -> None:
    """Draw a method's means, of which the first `own` are joined, and single runs."""
    options = looks(entry.look or "", entry.hollow) | {"markersize": 4.5, "markeredgewidth": 0.7}
    single = options | {"markersize": 1.8}
    means = {place + shift: sample for place, sample in enumerate(samples) if sample is not None}
    line: list[tuple[float, float]] = []
    for x, sample in means.items():
        if sample.mean > 0:
            line += [(x, sample.mean)] if x < own - 0.5 else [(x, math.nan), (x, sample.mean)]
    axis.plot(
        [x for x, _ in line], [y for _, y in line], **options | {"linestyle": "-", "linewidth": 0.8}, label=entry.name
    )
    for x, sample in means.items():
        if sample.mean <= 0:
            on_lower_edge(axis, x, **options)
        if len(sample.values) > 1:
            singles = [value for value in sample.values if value > 0]
            axis.plot([x] * len(singles), singles, **single)


def by_size(runs: SizeRuns, width: str, metric: str, digits: int) -> Table:
    """Return a metric of every row by size and text, with the number of runs; `digits` are decimals."""
    columns = [(size.name, text) for size in runs.sizes if size.tick for text in TEXTS]
    rows = []
    for entry in ENTRIES:
        samples = [runs.sample(size, width, entry.name, f"{metric}/{text}") for size, text in columns]
        if any(samples):
            cells = tuple(Cell(sample) if sample is not None else Cell(text=DASH) for sample in samples)
            rows.append(Row((entry.name,), cells))
    words = {"excess": "Excess loss", "kl": "Divergence from the float model"}[metric]
    caption = f"{words} by model size, {width[1:]} bits: mean ± standard deviation (number of runs)"
    heads = ("method", *(f"{size}, {TEXTS[text]}" for size, text in columns))
    name = f"{metric}-by-size-{width}"
    return Table(name, caption, heads, tuple(rows), number=decimals(digits), counted=True, folded=metric == "kl")


def all_of(runs: SizeRuns, size: str) -> Table:
    """Return every row of one model: excess and divergence by text, with the number of runs; variants behind theirs."""
    points = runs.of(size)
    places = {entry.name: place for place, entry in enumerate(ENTRIES)}

    def rank(name: str) -> tuple[int, str]:
        return max((place for row, place in places.items() if name.startswith(row)), default=len(places)), name

    names = sorted({point.entry for point in points}, key=rank)
    columns = [(measure, text) for measure in ("excess", "kl") for text in TEXTS]
    rows = []
    for width in sorted({point.width for point in points}):
        for name in names:
            samples = [runs.sample(size, width, name, f"{measure}/{text}") for measure, text in columns]
            if any(samples):
                cells = tuple(Cell(sample) if sample is not None else Cell(text=DASH) for sample in samples)
                rows.append(Row((width, name), cells))
    words = {"excess": "excess", "kl": "divergence"}
    heads = ("setting", "method", *(f"{words[measure]}, {TEXTS[text]}" for measure, text in columns))
    caption = f"Excess loss and divergence in nats, {size}: mean ± standard deviation (number of runs)"
    name = f"all-of-{size.replace(' ', '').replace(',', '-').lower()}"
    return Table(name, caption, heads, tuple(rows), number=decimals(4), counted=True)
