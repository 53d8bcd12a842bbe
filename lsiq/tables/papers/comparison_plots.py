"""Figures that compare methods: what they lose, and at which price."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lsiq.report.compact import Run
from lsiq.tables.figure import Figure, empty, legend_below, looks, on_lower_edge, panels, plain_numbers
from lsiq.tables.papers.layout import BUNDLED, study_methods
from lsiq.tables.papers.perplexity import MORE_TEXT, had_more_text
from lsiq.tables.protocol import AUGMENTED, STUDY, Protocol
from lsiq.tables.study import Runs

EXCESS = "excess/bundled@512"
Cost = Callable[[Run], float | None]
LABEL = "excess loss, bundled text (nats)"


def excess_by_method(runs: Runs, settings: Sequence[str], name: str = "excess-by-method") -> Figure:
    """Draw the excess loss of every method, a panel per model."""
    canvas, axes = panels(1, len(BUNDLED), 3.4, sharey=True)
    entries = _entries(runs, settings)
    for axis, model in zip(axes, BUNDLED, strict=True):
        for place, (label, protocol, method) in enumerate(entries):
            shift = (place - (len(entries) - 1) / 2) * 0.8 / max(len(entries), 1)
            options = looks(method, protocol is AUGMENTED) | {"label": label}
            for index, setting in enumerate(settings):
                sample = runs.sample(protocol, model, setting, method, EXCESS)
                if sample is None:
                    continue
                if sample.mean > 0:
                    x, y, error = index + shift, sample.mean, sample.spread or 0.0
                    axis.errorbar(x, y, error, capsize=1.5, elinewidth=0.8, **options)
                else:
                    on_lower_edge(axis, index + shift, **options)
        plain_numbers(axis)
        axis.set_xticks(range(len(settings)), settings)
        axis.set_xlim(-0.5, len(settings) - 0.5)
        axis.grid(False, axis="x")
        for border in range(1, len(settings)):
            axis.axvline(border - 0.5, color="#e5e5e5", linewidth=0.6)
        axis.set_title(model)
    axes[0].set_ylabel(LABEL)
    legend_below(canvas, axes, [label for label, *_ in entries])
    return Figure(name, "Excess loss over the float model by method, mean and standard deviation over seeds", canvas)


def _entries(runs: Runs, settings: Sequence[str]) -> list[tuple[str, Protocol, str]]:
    """The methods that were measured, with the name and protocol of each; those with augmented text come twice."""
    entries: list[tuple[str, Protocol, str]] = []
    for method in study_methods(settings):
        if any(runs.sample(STUDY, model, setting, method, EXCESS) for model in BUNDLED for setting in settings):
            entries.append((method, STUDY, method))
        if had_more_text(runs, settings, method):
            entries.append((method + MORE_TEXT, AUGMENTED, method))
    return entries


def quality_against_bits(runs: Runs, settings: Sequence[str]) -> Figure:
    """Draw excess loss against average bits, with the frontier of what nothing beats in both."""

    def bits(run: Run) -> float | None:
        return run.average_bits

    return _trade("quality-bits", "Quality against size", "average bits per weight", runs, settings, bits, False)


def quality_against_time(runs: Runs, settings: Sequence[str]) -> Figure:
    """Draw excess loss against the time it takes to quantise, with the frontier."""

    def seconds(run: Run) -> float | None:
        return run.seconds if run.machine.get("device") == "cuda" else None

    return _trade("quality-time", "Quality against time on a GPU", "seconds to quantise", runs, settings, seconds, True)


def _trade(name: str, caption: str, label: str, runs: Runs, settings: Sequence[str], of: Cost, log: bool) -> Figure:
    canvas, axes = panels(1, len(BUNDLED), 3.2, sharey=True)
    entries = _entries(runs, settings)
    for axis, model in zip(axes, BUNDLED, strict=True):
        points = []
        for title, protocol, method in entries:
            options = looks(method, protocol is AUGMENTED) | {"label": title}
            for setting in settings:
                sample = runs.sample(protocol, model, setting, method, EXCESS)
                cost = runs.mean(protocol, model, setting, method, of)
                if sample is None or cost is None:
                    continue
                points.append((cost, sample.mean))
                if sample.mean > 0:
                    axis.plot(cost, sample.mean, **options)
                else:
                    on_lower_edge(axis, cost, **options)
        axis.set_title(model)
        if not points:
            empty(axis, f"python run.py sweep=study model={model}")
            continue
        costs, losses = zip(*_frontier(points), strict=True)
        axis.plot(costs, losses, color="#999999", linewidth=1, zorder=1, drawstyle="steps-post")
        plain_numbers(axis)
        if log:
            plain_numbers(axis, "x")
        axis.set_xlabel(label)
    axes[0].set_ylabel(LABEL)
    legend_below(canvas, axes, [title for title, *_ in entries])
    listed = settings[0] if len(settings) == 1 else ", ".join(settings)
    return Figure(name, f"{caption} ({listed}); the grey line joins what nothing beats in both", canvas)


def _frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    frontier: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not frontier or loss < frontier[-1][1]:
            frontier.append((cost, loss))
    return frontier
