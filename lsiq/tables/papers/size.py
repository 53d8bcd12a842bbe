"""What methods lose on models of three sizes: the scale study's runs under today's names, as tables and a figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from lsiq.errors import InputError
from lsiq.report.compact import Run, read_runs
from lsiq.results.record import origin_note
from lsiq.tables.figure import Figure, legend_below, looks, on_lower_edge, panels, plain_numbers
from lsiq.tables.protocol import ROOT
from lsiq.tables.study import Sample
from lsiq.tables.table import DASH, Cell, Row, Table, decimals

# Runs that report: the study's other runs measured WikiText-2's validation alone, on which settings were chosen.
REPORTED = ["wikitext2", "file"]
TEXTS = {"file": "C4", "wikitext2": "WikiText-2"}


@dataclass(frozen=True)
class Size:
    """A size of model: its name, the models of it in the records, and what a figure writes below it."""

    name: str
    models: tuple[str, ...]
    tick: str


@dataclass(frozen=True)
class Entry:
    """A row of the tables, and a line of the figure.

    Attributes:
        look: the method whose colour and marker it has; None where tables alone have it.
        hollow: whether it is a variant of that method.
    """

    name: str
    look: str | None = None
    hollow: bool = False


SIZES = (
    Size("11 M", ("tiny-llama",), "tiny-llama\n11 M\ngroups of 128"),
    Size("90 M", ("l90",), "ladder\n90 M\ngroups of 128"),  # two trainings of one recipe
    Size("SmolLM2", ("smol", "smollm2-135m"), "SmolLM2\n135 M\ngroups of 64"),
)
PACKAGE, PACKAGE_EXTENDED = "AutoRound's package", "AutoRound's package, alg_ext"
ENTRIES = (
    Entry("rtn", "rtn"),
    Entry("gptq", "gptq"),
    Entry("awq", "awq"),
    Entry("omniquant", "omniquant"),
    Entry("omniquant, clipping at 3e-2"),
    Entry("lsi-diagonal", "lsi-diagonal"),
    Entry("lsi-diagonal at 3e-3", "lsi-diagonal", hollow=True),
    Entry("lsi-corner", "lsi-corner"),
    Entry("full corner, rate in steps"),
    Entry("autoround", "autoround"),
    Entry(PACKAGE, "autoround", hollow=True),
    Entry(PACKAGE_EXTENDED),
    Entry("lsi without increments", "lsi", hollow=True),
    Entry("lsi", "lsi"),
    Entry("lsi at 3e-3"),
    Entry("lsi, random directions at 3e-3"),
    Entry("dense at 3e-3, searched", "dense"),
    Entry("rounding with CL", "best-blocks", hollow=True),
    Entry("rounding with CL, then latents", "best", hollow=True),
    Entry("lsi with CL, then step sizes"),
    Entry("best", "best"),
)
# By file of records: the label of a run, and its row. Labels of scale.jsonl are those of its day.
_SAME = {name: name for name in ("rtn", "gptq", "awq", "autoround")}
LABELS: Mapping[str, Mapping[str, str]] = {
    "scale": _SAME
    | {
        "oq": "omniquant",
        "oq3": "omniquant, clipping at 3e-2",
        "diag3": "lsi-diagonal at 3e-3",
        "lsi0": "lsi-corner",
        "lsif": "full corner, rate in steps",
        "rs": "lsi without increments",
        "lsird": "lsi",
        "lsird3": "lsi at 3e-3",
        "lsirdx": "lsi, random directions at 3e-3",
        "dense": "dense at 3e-3, searched",
        "bestrc": "lsi with CL, then step sizes",
        "best0": "best",
    },
    "scale-seeds": _SAME
    | {name: name for name in ("omniquant", "lsi-diagonal", "lsi")}
    # Not the methods of these names: these train roundings, not weights, and the end starts from latent weights.
    | {"best-blocks": "rounding with CL", "best": "rounding with CL, then latents"},
}
# A peer's checkpoints were evaluated as models of their own: by name, the width and the row.
PEERS = {
    "ar-w2": ("w2", PACKAGE),
    "ar-w2x": ("w2", PACKAGE_EXTENDED),
    "ar-w3": ("w3", PACKAGE),
    "ar-w4": ("w4", PACKAGE),
}
PEERS_OF = "smollm2-135m"


@dataclass(frozen=True)
class Point:
    """A run as tables show it: its size, width in bits (w2), row and metrics.

    Attributes:
        model: tells models of one size apart: perplexities of the float model, to four digits.
    """

    size: str
    width: str
    entry: str
    metrics: Mapping[str, float]
    model: tuple[str, ...] = ()


class SizeRuns:
    """The reported runs of the scale study.

    Raises:
        InputError: a run's label has no row, or two runs of a size were measured on different tokens.
    """

    def __init__(self, runs: Mapping[str, Iterable[Run]]) -> None:
        latest: dict[tuple[Any, ...], tuple[str, Run]] = {}
        for file, of_file in runs.items():
            for run in sorted(of_file, key=lambda run: run.created):
                if run.get("eval.corpora") == REPORTED:
                    latest[file, run.model, run.setting, run.method, run.seed] = (file, run)
        reported = list(latest.values())
        quantized = [(file, run) for file, run in reported if run.model not in PEERS]
        base = next((run for _, run in quantized if run.model == PEERS_OF), None)
        self.points = [_point(file, run) for file, run in quantized]
        self.points += [_peer(run, base) for _, run in reported if run.model in PEERS]
        self.notes = _notes(run for _, run in quantized)
        _check_tokens(run for _, run in reported)

    def sample(self, size: str, width: str, entry: str, metric: str) -> Sample | None:
        """Return what the runs of a row measured; rounding to nearest counts once per model, as no seed changes it."""
        measured = [
            (point, value)
            for point in self.points
            if (point.size, point.width, point.entry) == (size, width, entry)
            for key, value in point.metrics.items()
            if key.partition("@")[0] == metric
        ]
        if entry == "rtn":
            measured = list({point.model: (point, value) for point, value in measured}.values())
        if not measured:
            return None
        values = tuple(value for _, value in measured)
        return Sample(values, entry == "rtn" and len(values) == 1, self.notes.get(size, ()))


def load_sizes(folder: Path = ROOT / "analysis" / "records") -> SizeRuns:
    """Return the committed runs of the scale study."""
    return SizeRuns({file: read_runs(folder / f"{file}.jsonl") for file in LABELS})


def excess_by_size(runs: SizeRuns, widths: Sequence[str]) -> Figure:
    """Draw excess against size, a line per method: a row of panels per width, a panel per text."""
    canvas, axes = panels(len(widths), len(TEXTS), 3.1, sharex=True, sharey="row")
    entries = [entry for entry in ENTRIES if entry.look is not None]
    places = [(width, text) for width in widths for text in TEXTS]
    counts: list[int] = []
    for axis, (width, text) in zip(axes, places, strict=True):
        for place, entry in enumerate(entries):
            shift = (place - (len(entries) - 1) / 2) * 0.8 / len(entries)
            samples = [runs.sample(size.name, width, entry.name, f"excess/{text}") for size in SIZES]
            counts += [len(sample.values) for sample in samples if sample is not None]
            _draw(axis, entry, samples, shift)
        plain_numbers(axis)
        axis.set_xticks(range(len(SIZES)), [size.tick for size in SIZES])
        axis.set_xlim(-0.5, len(SIZES) - 0.5)
        axis.grid(False, axis="x")
        for border in range(1, len(SIZES)):
            axis.axvline(border - 0.5, color="#e5e5e5", linewidth=0.6)
        axis.set_title(f"{width[1:]} bits, {TEXTS[text]}")
        if text == next(iter(TEXTS)):
            axis.set_ylabel("excess loss (nats)")
    legend_below(canvas, axes, [entry.name for entry in entries], columns=4)
    caption = (
        f"Excess loss against model size: means over {min(counts)} to {max(counts)} runs, which small markers show one "
        "by one; hollow: variants, and AutoRound's package"
    )
    return Figure("excess-by-size", caption, canvas)


def _draw(axis: Axes, entry: Entry, samples: Sequence[Sample | None], shift: float) -> None:
    options = looks(entry.look or "", entry.hollow) | {"markersize": 4.5, "markeredgewidth": 0.7}
    single = options | {"markersize": 1.8}
    means = {place + shift: sample for place, sample in enumerate(samples) if sample is not None}
    positive = {x: sample.mean for x, sample in means.items() if sample.mean > 0}
    axis.plot(
        list(positive), list(positive.values()), **options | {"linestyle": "-", "linewidth": 0.8}, label=entry.name
    )
    for x, sample in means.items():
        if sample.mean <= 0:
            on_lower_edge(axis, x, **options)
        if len(sample.values) > 1:
            singles = [value for value in sample.values if value > 0]
            axis.plot([x] * len(singles), singles, **single)


def by_size(runs: SizeRuns, width: str, metric: str, digits: int) -> Table:
    """Return a metric of every row by size and text, with the number of runs; `digits` are decimals."""
    columns = [(size.name, text) for size in SIZES for text in TEXTS]
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


def _point(file: str, run: Run) -> Point:
    size = next((size.name for size in SIZES if run.model in size.models), None)
    entry = LABELS[file].get(run.method)
    if size is None or entry is None:
        raise InputError(
            f"{file}.jsonl: {run.model}, {run.method}: the tables by size have no such model or row; "
            "add it to lsiq/tables/papers/size.py"
        )
    model = tuple(f"{value:.4g}" for key, value in sorted(run.metrics.items()) if key.startswith("float/ppl/"))
    return Point(size, run.setting[:2], entry, run.metrics, model)


def _peer(run: Run, base: Run | None) -> Point:
    """Return the run of a peer's checkpoint: its excess is over the float model, which another run measured."""
    if base is None:
        raise InputError(f"{run.model}: no run of {PEERS_OF} says what the float model's perplexity is; collect one")
    width, entry = PEERS[run.model]
    return Point(SIZES[-1].name, width, entry, excess_over(base, run))


def excess_over(base: Run, peer: Run) -> dict[str, float]:
    """Return by text the excess of a peer's checkpoint, the float model of its own run, over that of `base`."""
    ratios = {key: value / base.metrics[key] for key, value in peer.metrics.items() if key.startswith("float/ppl/")}
    return {key.replace("float/ppl/", "excess/"): math.log(ratio) for key, ratio in ratios.items()}


def _check_tokens(runs: Iterable[Run]) -> None:
    tokens: dict[str, tuple[str, str]] = {}
    size_of = {model: size.name for size in SIZES for model in size.models} | dict.fromkeys(PEERS, SIZES[-1].name)
    for run in runs:
        for key, digest in run.tokens.items():
            model, other = tokens.setdefault(f"{size_of[run.model]} {key}", (run.model, digest))
            if other != digest:
                raise InputError(
                    f"{key}: {run.model} and {model} were measured on different tokens ({digest}, {other}), "
                    "so one table cannot hold both; leave one of them out of the records"
                )


def _notes(runs: Iterable[Run]) -> dict[str, tuple[str, ...]]:
    """By size, what must be said wherever its numbers stand."""
    names = {model: size.name for size in SIZES for model in size.models}
    origins = {names[run.model]: origin_note(run.model, run.weights_from) for run in runs if run.weights_from}
    return {size: (note,) for size, note in origins.items()}
