"""Figures of how runs learned: weights, losses, singular values, errors by layer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap

from lsiq.tables.figure import BLUE, RED, Figure, empty, legend_below, look, panels, plain_numbers
from lsiq.tables.papers.ablations import AXES, MODEL, SETTING, Axis, along
from lsiq.tables.papers.layout import BUNDLED, CORPORA
from lsiq.tables.protocol import STUDY
from lsiq.tables.study import Runs
from lsiq.tables.traces import Trace


def weight_distribution(traces: Sequence[Trace]) -> Figure:
    """Draw how many weights lie where, in the float model and after training and rounding."""
    trace = _longest(traces)
    caption = "Weights of the float model and after training and rounding"
    if trace is None:
        canvas, (axis,) = panels(1, 1, 2.0)
        empty(axis, "python run.py method=lsi-corner")
        return Figure("weight-distribution", caption, canvas)
    linears = list(dict.fromkeys(entry["linear"] for entry in trace.histograms))
    canvas, axes = panels(len(linears), len(trace.histograms) // len(linears), 2.1)
    ordered = [entry for linear in linears for entry in trace.histograms if entry["linear"] == linear]
    for axis, entry in zip(axes, ordered, strict=True):
        edges = np.linspace(-entry["range"], entry["range"], len(entry["before"]) + 1)
        total = sum(entry["before"])
        before, after = (np.array(entry[key]) / total for key in ("before", "after"))
        axis.stairs(before, edges, fill=True, color="#c8c8c8", label="float")
        axis.stairs(after, edges, color=BLUE, linewidth=1.2, label=f"{trace.method}, rounded")
        axis.set_yscale("log")
        axis.set_ylim(0.5 / total, 1)
        axis.set_title(f"block {entry['block']}, {entry['linear'].rpartition('.')[2]}")
        axis.set_xlabel("weight")
    for axis in axes[:: len(axes) // len(linears)]:
        axis.set_ylabel("share of weights")
    legend_below(canvas, axes)
    return Figure("weight-distribution", f"{caption}: {_label(trace)}", canvas)


def training_details(runs: Runs, traces: Sequence[Trace]) -> Figure:
    """Draw perplexity and loss against samples and epochs."""
    canvas, axes = panels(2, 2, 2.5)
    epochs = next(axis for axis in AXES if axis.sweep == "ablation-epochs")
    samples = next(axis for axis in AXES if axis.sweep == "ablation-samples")
    for place, axis, label in (
        (axes[0], epochs, "epochs"),
        (axes[1], samples, "calibration sequences (of 512 tokens)"),
    ):
        plots = [
            _along(place, runs, axis, corpus, colour) for corpus, colour in (("bundled", BLUE), ("wikitext2", RED))
        ]
        if not any(plots):
            empty(place, f"python run.py sweep={axis.sweep}")
            continue
        place.set_xlabel(label)
        place.set_ylabel("perplexity")
        place.legend(fontsize=7)
    learned = [t for t in traces if (t.model, t.setting, t.method) == (MODEL, SETTING, "lsi-corner")]
    if learned:
        longest = max(learned, key=_training)
        _losses_by_block(axes[2], longest)
        by_samples = {t.samples: t for t in learned if len(t.losses[0]) == len(longest.losses[0])}
        _losses_by_samples(axes[3], [by_samples[count] for count in sorted(by_samples)])
    else:
        for place in axes[2:]:
            empty(place, "python run.py sweep=ablation-epochs")
    return Figure("training-details", f"What lsi learns from: {MODEL} {SETTING}", canvas)


def _along(place: Axes, runs: Runs, axis: Axis, corpus: str, colour: str) -> bool:
    """Draw the perplexity of a corpus along an axis of the ablations; False where it was not measured."""
    points = along(runs, axis, f"ppl/{corpus}@512")
    if points:
        where = [value for value, _ in points]
        means = [statistics.fmean(values) for _, values in points]
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
        place.errorbar(where, means, spread, color=colour, marker="o", capsize=2, label=CORPORA[corpus])
        place.set_xscale("log", base=2)
        place.set_xticks(where, [str(value) for value in where])
    return bool(points)


def _losses_by_block(axis: Axes, trace: Trace) -> None:
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(trace.losses)))
    for block, (losses, colour) in enumerate(zip(trace.losses, colours, strict=True)):
        axis.plot(range(1, len(losses) + 1), losses, color=colour, label=f"block {block}")
    plain_numbers(axis)
    axis.set_xlabel(f"epoch ({trace.samples} sequences)")
    axis.set_ylabel("block loss (relative)")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=7)


def _losses_by_samples(axis: Axes, traces: Sequence[Trace]) -> None:
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(traces)))
    for trace, colour in zip(traces, colours, strict=True):
        means = [statistics.fmean(values) for values in zip(*trace.losses, strict=True)]
        axis.plot(range(1, len(means) + 1), means, color=colour, label=f"{trace.samples} sequences")
    plain_numbers(axis)
    axis.set_xlabel("epoch")
    axis.set_ylabel("mean block loss (relative)")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=7)


def singular_values(traces: Sequence[Trace]) -> Figure:
    """Draw what was added to singular values over the epochs: a line per value, the largest dark."""
    trace = _longest(traces)
    caption = "What training adds to singular values"
    if trace is None:
        canvas, (axis,) = panels(1, 1, 2.0)
        empty(axis, "python run.py method=lsi-corner")
        return Figure("singular-values", caption, canvas)
    linears = list(dict.fromkeys(entry["linear"] for entry in trace.increments))
    canvas, axes = panels(len(linears), len(trace.increments) // len(linears), 2.1, sharex=True)
    ordered = [entry for linear in linears for entry in trace.increments if entry["linear"] == linear]
    for axis, entry in zip(axes, ordered, strict=True):
        steps = np.vstack([np.zeros(len(entry["epochs"][0])), np.array(entry["epochs"])])
        colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, steps.shape[1]))
        for value in range(steps.shape[1]):
            axis.plot(steps[:, value], color=colours[value], linewidth=0.8)
        axis.set_title(f"block {entry['block']}, {entry['linear'].rpartition('.')[2]}")
    columns = len(axes) // len(linears)
    for axis in axes[-columns:]:
        axis.set_xlabel("epoch")
    for axis in axes[::columns]:
        axis.set_ylabel("increment")
    shades = ListedColormap(mpl.colormaps["viridis"](np.linspace(0, 0.9, 64)))
    bar = canvas.colorbar(ScalarMappable(cmap=shades), ax=axes, ticks=[0, 1], shrink=0.6)
    bar.ax.set_yticklabels(["largest\nvalue", "smallest"])
    return Figure("singular-values", f"{caption}: {_label(trace)}", canvas)


def error_by_layer(runs: Runs, setting: str, methods: Sequence[str]) -> Figure:
    """Draw the relative error of each block's output, by method."""
    canvas, axes = panels(1, len(BUNDLED), 2.8, sharey=True)
    for axis, model in zip(axes, BUNDLED, strict=True):
        has_lines = False
        for method in methods:
            rows = [run.errors for run in runs.find(STUDY, model, setting, method)]
            rows = [row for row in rows if row and None not in row]
            if rows:
                errors, (colour, marker) = np.array(rows, float), look(method)
                spread = errors.std(0, ddof=1) if len(errors) > 1 else None
                blocks = range(errors.shape[1])
                axis.errorbar(
                    blocks, errors.mean(0), spread, color=colour, marker=marker, capsize=2, linewidth=1, label=method
                )
                has_lines = True
        axis.set_title(f"{model}, {setting}")
        if not has_lines:
            empty(axis, f"python run.py sweep=study model={model} quant={setting}")
            continue
        plain_numbers(axis)
        axis.set_xlabel("block")
    axes[0].set_ylabel("relative squared error")
    legend_below(canvas, axes)
    return Figure(
        "error-by-layer", f"Error of each block's output at {setting}, mean and standard deviation over seeds", canvas
    )


def _longest(traces: Sequence[Trace]) -> Trace | None:
    """The run of lsi-corner that was trained longest."""
    return max((trace for trace in traces if trace.method == "lsi-corner"), key=_training, default=None)


def _training(trace: Trace) -> tuple[int, int, str]:
    return len(trace.losses[0]), trace.samples, trace.run_id


def _label(trace: Trace) -> str:
    return f"{trace.model} {trace.setting} {trace.method}, {trace.samples} sequences, seed {trace.seed}"
