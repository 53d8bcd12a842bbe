"""Figures that compare methods: what they lose, and at which price."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lsiq.tables.figure import Figure, empty, legend_below, look, panels, plain_numbers
from lsiq.tables.layout import BUNDLED, study_methods
from lsiq.tables.protocol import STUDY
from lsiq.tables.runs import Run
from lsiq.tables.study import Runs

EXCESS = "excess/bundled@512"
Cost = Callable[[Run], float | None]
LABEL = "excess loss, bundled text (nats)"


def excess_by_method(runs: Runs, settings: Sequence[str], name: str = "excess-by-method") -> Figure:
    """Draw the excess loss of every method, a panel per model."""
    canvas, axes = panels(1, len(BUNDLED), 3.4, sharey=True)
    methods = [
        method
        for method in study_methods(settings)
        if any(runs.sample(STUDY, model, setting, method, EXCESS) for model in BUNDLED for setting in settings)
    ]
    for axis, model in zip(axes, BUNDLED, strict=True):
        for place, method in enumerate(methods):
            colour, marker = look(method)
            for index, setting in enumerate(settings):
                sample = runs.sample(STUDY, model, setting, method, EXCESS)
                if sample is None or sample.mean <= 0:
                    continue
                shift = (place - (len(methods) - 1) / 2) * 0.8 / max(len(methods), 1)
                looks: Any = {"color": colour, "marker": marker, "linestyle": "none", "label": method}
                axis.errorbar(index + shift, sample.mean, sample.spread or 0.0, capsize=1.5, elinewidth=0.8, **looks)
        plain_numbers(axis)
        axis.set_xticks(range(len(settings)), settings)
        axis.set_xlim(-0.5, len(settings) - 0.5)
        axis.grid(False, axis="x")
        for border in range(1, len(settings)):
            axis.axvline(border - 0.5, color="#e5e5e5", linewidth=0.6)
        axis.set_title(model)
    axes[0].set_ylabel(LABEL)
    legend_below(canvas, axes)
    return Figure(name, "Excess loss over the float model by method, mean and standard deviation over seeds", canvas)


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
    for axis, model in zip(axes, BUNDLED, strict=True):
        points = []
        for setting in settings:
            for method in study_methods([setting]):
                sample = runs.sample(STUDY, model, setting, method, EXCESS)
                cost = runs.mean(STUDY, model, setting, method, of)
                if sample is None or cost is None or sample.mean <= 0:
                    continue
                colour, marker = look(method)
                axis.plot(cost, sample.mean, color=colour, marker=marker, linestyle="none", label=method)
                points.append((cost, sample.mean))
        if not points:
            empty(axis, f"python run.py sweep=study model={model}")
            continue
        frontier = _frontier(points)
        axis.plot(*zip(*frontier, strict=True), color="#999999", linewidth=1, zorder=1, drawstyle="steps-post")
        plain_numbers(axis)
        if log:
            plain_numbers(axis, "x")
        axis.set_title(model)
        axis.set_xlabel(label)
    axes[0].set_ylabel(LABEL)
    legend_below(canvas, axes)
    listed = settings[0] if len(settings) == 1 else ", ".join(settings)
    return Figure(name, f"{caption} ({listed}); the grey line joins what nothing beats in both", canvas)


def _frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not found or loss < found[-1][1]:
            found.append((cost, loss))
    return found
