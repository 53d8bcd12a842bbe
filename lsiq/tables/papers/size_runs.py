"""Which runs stand in which row of the tables by size: the scale study's, and all that follow its protocol."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lsiq.errors import InputError
from lsiq.experiment.composed import recipe_for
from lsiq.report.compact import Run, read_runs
from lsiq.results.record import origin_note
from lsiq.tables.papers.layout import sweep_jobs
from lsiq.tables.papers.model_sizes import (
    AGAIN_90M,
    AGAIN_300M,
    BEFORE,
    SIZES,
    SMOLLM2,
    TEXTS,
    THIRD_300M,
    TRAININGS,
    training,
    width,
)
from lsiq.tables.protocol import ROOT, composed, contradiction, method_overrides
from lsiq.tables.study import Sample

# Runs that report: the study's other runs measured WikiText-2's validation alone, on which settings were chosen.
REPORTED = set(TEXTS)
SWEEP = "study-recipes"
MEASURED = (*SIZES, *TRAININGS)
VARIED = ("model=", "quant=", "seed=")  # what its jobs say beside the method


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


PACKAGE, PACKAGE_EXTENDED = "AutoRound's package", "AutoRound's package, alg_ext"
PACKAGE_LONGER = f"{PACKAGE}, 1000 iterations"  # at 2 bits with alg_ext
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
    Entry("sde", "sde"),
    Entry("dense"),
    Entry("dense at 3e-3, searched", "dense"),
    Entry("rounding with CL", "best-blocks", hollow=True),
    Entry("rounding with CL, then latents", "best", hollow=True),
    Entry("lsi with CL, then step sizes"),
    Entry("best", "best"),
)


def beside_lsi(corner: int) -> dict[str, str]:
    """By label, the rows of `sweep=sde-beside-lsi` with a corner of so many directions."""
    rows = {
        "diag": "lsi-diagonal",
        f"corner{corner}": f"lsi-diagonal, corner of {corner}",
        "sde1": "sde, band of 1, no corner",
    }
    return rows | {f"{label}-cl": f"{row}, CL" for label, row in rows.items()}


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
    "peers-300m-again": {"best-10": "best-10"},
    "peers-90m-again": {name: name for name in ("lsi", "best", "best-10")} | beside_lsi(39),
    "opt-30m-again": _SAME
    | {name: name for name in ("omniquant", "lsi-diagonal", "lsi", "best", "rotate+gptq")}
    | {
        "rotate+sde-cl": "rotate, then sde + CL",
        "best-before": "best before",
        "best-kept": "best, LET at 5e-3, best epochs kept",
        "best-kept-1e-2": "best, LET at 1e-2, best epochs kept",
        "best-longer": "best, LET at 5e-3, best epochs kept, twice the steps",
    },
    "opt-30m-activations": {name: name for name in ("omniquant", "lsi", "best")}
    | {
        "rotate+sde-cl": "rotate, then sde + CL",
        "best-before": "best before",
        "best-let3e-4": "best, LET at 3e-4",
        "best-longer": "best, twice the steps",
    },
}


@dataclass(frozen=True)
class Peer:
    """A checkpoint that a peer's package made, evaluated as a model of its own: where it stands."""

    size: str
    width: str
    entry: str = PACKAGE


PEERS = {
    "ar-w2": Peer("SmolLM2", "w2"),
    "ar-w2x": Peer("SmolLM2", "w2", PACKAGE_EXTENDED),
    "ar-w3": Peer("SmolLM2", "w3"),
    "ar-w4": Peer("SmolLM2", "w4"),
    "ar-w2-200": Peer("SmolLM2, whole texts", "w2"),
    "ar-w3-200": Peer("SmolLM2, whole texts", "w3"),
    "ar-w4-200": Peer("SmolLM2, whole texts", "w4"),
    "ar90-w2-200": Peer("90 M", "w2"),
    "ar90-w3-200": Peer("90 M", "w3"),
    "ar90-w4-200": Peer("90 M", "w4"),
    "ar-300m-w2-200": Peer(AGAIN_300M, "w2"),
    "ar-300m-w3-200": Peer(AGAIN_300M, "w3"),
    "ar-300m-w4-200": Peer(AGAIN_300M, "w4"),
    "ar-300m-w2-1000": Peer(THIRD_300M, "w2", PACKAGE_LONGER),
    "ar-300m-w3-1000": Peer(THIRD_300M, "w3", PACKAGE_LONGER),
} | {
    f"ar-90m-{width}-{iterations}": Peer(AGAIN_90M, width, row)
    for width in ("w2", "w3", "w4")
    for iterations, row in ((200, PACKAGE), (1000, PACKAGE_LONGER))
}
# What the peer quantised: the model whose perplexity is taken from its checkpoints'.
PEERS_OF = {
    "SmolLM2": SMOLLM2,
    "SmolLM2, whole texts": SMOLLM2,
    "90 M": "llama-90m",
    AGAIN_90M: "llama-90m-4",
    AGAIN_300M: "llama-300m-3",
    THIRD_300M: "llama-300m-4",
}


@dataclass(frozen=True)
class Point:
    """A run as tables show it: its size, setting (w2), row, metrics, bits per weight and type of the measured model.

    Attributes:
        model: tells models of one size apart: its name, and perplexities of the float model, to four digits.
        window_means: by measure, means of blocks of the windows, as compact records keep them.
    """

    size: str
    width: str
    entry: str
    metrics: Mapping[str, float]
    model: tuple[str, ...] = ()
    bits: float | None = None
    dtype: str | None = None
    seed: int | None = None
    window_means: Mapping[str, Sequence[float]] = field(default_factory=dict)


class SizeRuns:
    """The reported runs at all sizes; of two runs of one model, setting, row and seed the later one counts.

    Files that `LABELS` knows have names of their day. Of other files those runs count whose calibration and method are
    what `sweeps/study-recipes.yaml` says today.

    Raises:
        InputError: a label of a file in `LABELS` has no row, or two runs of a size and setting were measured on
            different tokens.
    """

    def __init__(self, runs: Mapping[str, Iterable[Run]]) -> None:
        latest: dict[tuple[Any, ...], tuple[Point, Run]] = {}
        peers: list[Run] = []
        of_files = [(run.created, file, run) for file, of_file in runs.items() for run in of_file]
        for _, file, run in sorted(of_files, key=lambda entry: entry[:2]):
            if not reports(run):
                continue
            if run.model in PEERS:
                peers.append(run)
            elif (point := _point(file, run)) is not None:
                latest[point.size, point.model, run.setting, point.entry, run.seed] = (point, run)
        bases = [(point.size, run) for point, run in latest.values() if PEERS_OF.get(point.size) == run.model]
        of_peers = [(_peer(run, bases), run) for run in peers]
        self.points = [
            *_of_first_models([point for point, _ in latest.values()]),
            *(point for point, _ in of_peers),
        ]
        self.sizes = tuple(size for size in SIZES if any(point.size == size.name for point in self.points))
        self.notes = _notes(latest.values())
        check_tokens((f"{point.size} {point.width}", run) for point, run in [*latest.values(), *of_peers])

    def of_one_training(self) -> SizeRuns:
        """Return the runs without those of earlier trainings of a size's model: rows that compare like with like."""
        runs = copy(self)
        runs.points = [point for point in self.points if BEFORE.isdisjoint(point.model)]
        return runs

    def sample(self, size: str, width: str, entry: str, metric: str) -> Sample | None:
        """Return what the runs of a row measured; rounding to nearest counts once per model, as no seed changes it."""
        measured = [
            (point, value)
            for point in self.of(size, width, entry)
            for key, value in point.metrics.items()
            if key.partition("@")[0] == metric
        ]
        if entry == "rtn":
            measured = list({point.model[1:]: (point, value) for point, value in measured}.values())
        if not measured:
            return None
        values = tuple(value for _, value in measured)
        return Sample(values, entry == "rtn" and len(values) == 1, self.notes.get(size, ()))

    def of(self, size: str, width: str | None = None, entry: str | None = None) -> list[Point]:
        """Return the runs of a size, of one setting and row where they are given."""
        return [
            point
            for point in self.points
            if point.size == size and width in (None, point.width) and entry in (None, point.entry)
        ]


def load_sizes(folder: Path = ROOT / "analysis" / "records") -> SizeRuns:
    """Return the committed runs of all files that report by size."""
    return SizeRuns({file.stem: read_runs(file) for file in sorted(folder.glob("*.jsonl"))})


@cache
def _recipes() -> Mapping[str, tuple[str, ...]]:
    """By method, what the sweep says of it; model, setting and seed aside."""
    jobs = ([word for word in job if not word.startswith(VARIED)] for job in sweep_jobs(SWEEP))
    return {word.partition("=")[2]: tuple(job) for job in jobs for word in job if word.startswith("method=")}


def reports(run: Run) -> bool:
    """Whether the run measured the two texts that tables by size report."""
    return set(run.get("eval.corpora") or ()) == REPORTED


def contradiction_by_size(run: Run) -> str | None:
    """Return what keeps a run out of the tables by size, the dotted name of a setting; None if it stands there.

    Calibration and method must be what the sweep composes to today for a method of that name.
    """
    otherwise = [size.contradiction(run) for size in MEASURED if run.model in size.names] or ["model"]
    if None not in otherwise:
        return otherwise[0]
    expected = composed((f"sweep={SWEEP}", *_recipes().get(run.method, method_overrides(run.method))))
    if expected is None:
        return "method"
    stated = {"calib": expected["calib"], "method": recipe_for(expected["method"], run.config.get("quant"))}
    return contradiction(run.config, stated)


def _point(file: str, run: Run) -> Point | None:
    """Return where the run stands; None if it is another file's and measured, calibrated or made otherwise."""
    size = next((size.name for size in MEASURED if size.contradiction(run) is None), None)
    entry = LABELS[file].get(run.method) if file in LABELS else run.method
    if file in LABELS and (size is None or entry is None):
        raise InputError(
            f"{file}.jsonl: {run.model}, {run.method}: the tables by size have no such model or row; "
            "add it to lsiq/tables/papers/size_runs.py"
        )
    if size is None or entry is None or (file not in LABELS and contradiction_by_size(run) is not None):
        return None
    measured = (run.average_bits, run.dtype, run.seed, run.window_means)
    return Point(size, width(run.setting), entry, run.metrics, training(run), *measured)


def _of_first_models(points: Sequence[Point]) -> list[Point]:
    """Leave out runs of models of earlier trainings where a row has runs of a size's own."""
    own = {(point.size, point.width, point.entry) for point in points if BEFORE.isdisjoint(point.model)}
    return [p for p in points if BEFORE.isdisjoint(p.model) or (p.size, p.width, p.entry) not in own]


def _peer(run: Run, bases: Iterable[tuple[str, Run]]) -> Point:
    """Return the run of a peer's checkpoint: its excess is over the float model, which another run measured."""
    peer = PEERS[run.model]
    base = next((base for size, base in bases if size == peer.size and base.tokens == run.tokens), None)
    if base is None:
        raise InputError(
            f"{run.model}: no run of {PEERS_OF[peer.size]} says what the float model's perplexity is on the same "
            "tokens; collect one"
        )
    return Point(peer.size, peer.width, peer.entry, excess_over(base, run))


def excess_over(base: Run, peer: Run) -> dict[str, float]:
    """Return by text the excess of a peer's checkpoint, the float model of its own run, over that of `base`."""
    ratios = {key: value / base.metrics[key] for key, value in peer.metrics.items() if key.startswith("float/ppl/")}
    return {key.replace("float/ppl/", "excess/"): math.log(ratio) for key, ratio in ratios.items()}


def check_tokens(runs: Iterable[tuple[str, Run]]) -> None:
    """Raise InputError where runs that one table compares, by the name of the comparison, saw different tokens."""
    tokens: dict[str, tuple[str, str]] = {}
    for size, run in runs:
        for key, digest in run.tokens.items():
            model, other = tokens.setdefault(f"{size} {key}", (run.model, digest))
            if other != digest:
                raise InputError(
                    f"{key}: {run.model} and {model} were measured on different tokens ({digest}, {other}), "
                    "so one table cannot hold both; leave one of them out of the records"
                )


def _notes(runs: Iterable[tuple[Point, Run]]) -> dict[str, tuple[str, ...]]:
    """By size, what must be said wherever its numbers stand."""
    origins = {point.size: origin_note(run.model, run.weights_from) for point, run in runs if run.weights_from}
    return {size: (note,) for size, note in origins.items()}
