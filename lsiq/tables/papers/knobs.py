"""How a result moves with one setting: runs that are alike in all else, a line per model."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from lsiq.report.compact import Run
from lsiq.report.significance import compare_means
from lsiq.tables.figure import BLUE, GREEN, ORANGE, PINK, RED, SKY, Figure, legend_below, panels
from lsiq.tables.papers.model_sizes import SIZES, training, width
from lsiq.tables.study import Sample
from lsiq.tables.table import DASH, Cell, Row, Table, decimals

NONE = "none"  # the value of a setting of a part that a run does not have
TEXT = "kl/wikitext2@"
# A size has one colour in all figures; OPT's lines are dashed.
_COLOURS = {"3 M": SKY, "11 M": BLUE, "30 M": GREEN, "90 M": ORANGE, "300 M": RED, "SmolLM2": PINK}
_SAID_ONLY = ("label", "kernels", "graphs", "product", "retries")  # what a run is called, and how it was computed

Value = float | str


@dataclass(frozen=True)
class Knob:
    """A setting that is turned.

    Attributes:
        name: of the figure and the table.
        key: the setting's dotted name in a run's configuration; of a part, as in `method.parts.singular.lr`.
        words: what the axis says.
        today: the value that the method's file has.
        where: settings that a run must have for the values to mean the same, by dotted name; what is None it must lack.
    """

    name: str
    key: str
    words: str
    today: Value
    where: Mapping[str, Any]

    @property
    def part(self) -> str | None:
        """The part that the setting belongs to, as its module is called."""
        names = self.key.split(".")
        return names[2] if names[1] == "parts" else None


LSI = {"method.parts.rounding.bound": 0.5, "method.parts.clip.search": True}
# OmniQuant has no increments; SDE's parts hold a part of another name.
HOST = {f"method.parts.{part}": None for part in ("singular", "expansion", "dense", "rounding")}
KNOBS = (
    Knob("increments", "method.parts.singular.lr", "rate of lsi's increments, in steps of the grid", 1e-3, LSI),
    Knob("corner", "method.parts.singular.corner", "corner of lsi's increments", 0, LSI),
    Knob("clipping", "method.parts.clip.lr", "rate of lsi's clipping", 3e-2, LSI),
    Knob("epochs", "method.training.epochs", "epochs of lsi", 20, LSI),
    Knob("batch", "method.training.batch", "sequences in a step of lsi", 8, LSI),
    Knob("ahead", "method.training.ahead.blocks", "blocks that lsi looks ahead", 0, LSI),
    Knob("host-clipping", "method.parts.clip.lr", "rate of omniquant's clipping", 1e-1, HOST),
    Knob("host-ahead", "method.training.ahead.blocks", "blocks that omniquant looks ahead", 0, HOST),
    Knob("weights", "method.parts.dense.lr", "rate of best-blocks' weights, in steps of the grid", 3e-3, {}),
    Knob("directions", "method.parts.singular.directions", "directions of lsi's increments", "singular", LSI),
    Knob("start-weights", "method.start.parts.dense.lr", "rate of the weights in the blocks of best", 3e-3, {}),
)


@dataclass(frozen=True)
class Line:
    """Runs of one model and width that differ in one setting and in the seed.

    Attributes:
        values: by the value of the setting, the divergences of the seeds; in the order of the values.
        chosen_on: whether the text is the one that settings are chosen on, WikiText-2 validation, and not its test.
        windows: by value and seed the means of blocks of windows, for paired tests, where a run has them.
    """

    size: str
    width: str
    values: Mapping[Value, Sample]
    chosen_on: bool
    windows: Mapping[Value, Mapping[int, Sequence[float]]] = field(default_factory=dict)

    @property
    def least(self) -> Value:
        """The value with the least divergence."""
        return min(self.values, key=lambda value: self.values[value].mean)


def lines(runs: Iterable[Run], knob: Knob) -> list[Line]:
    """Return the lines of a setting: of each size, width and text those of the runs with the most values.

    Runs on a line have the same configuration but for the setting, the same tokens, and one model, which its perplexity
    tells from another training of its name. Runs without the part that has the setting count as its value `none`, but
    two other values make a line.
    """
    alike: dict[tuple[Any, ...], list[tuple[Value, str, Run]]] = defaultdict(list)
    for run in runs:
        size = next((size.name for size in SIZES if run.model in size.names), None)
        if size is None or not any(key.startswith(TEXT) for key in run.metrics):
            continue
        if any(run.get(key) != value for key, value in knob.where.items()):
            continue
        if (found := _turned(run, knob)) is not None:
            value, part, rest = found
            tokens = tuple(sorted(run.tokens.items()))
            alike[size, width(run.setting), training(run), tokens, rest].append((value, part, run))
    longest: dict[tuple[str, str, bool], Line] = {}
    for (size, bits, *_), like in alike.items():
        for part in sorted({part for _, part, _ in like if part != NONE}):
            line = _line(size, bits, [(value, run) for value, of, run in like if of in (part, NONE)])
            key = (size, bits, line.chosen_on)
            turned = len(line.values.keys() - {NONE}) > 1
            if turned and (key not in longest or len(line.values) > len(longest[key].values)):
                longest[key] = line
    order = [size.name for size in SIZES]
    return sorted(longest.values(), key=lambda line: (order.index(line.size), line.width, not line.chosen_on))


def _turned(run: Run, knob: Knob) -> tuple[Value, str, str] | None:
    """The value of the setting, what else its part has, and what else the run has; None without the setting."""
    config = _plain(run.config)
    method = config["method"]
    value = run.get(knob.key)
    if knob.part is not None:
        part = method.get("parts", {}).pop(knob.part, None)
        if part is None:
            return (NONE, NONE, json.dumps(config, sort_keys=True)) if method.get("parts") else None
        part.pop(knob.key.rpartition(".")[2], None)
        return (
            (value, json.dumps(part, sort_keys=True), json.dumps(config, sort_keys=True)) if value is not None else None
        )
    if value is None:
        return None
    *names, last = knob.key.split(".")
    place = config
    for name in names:
        place = place[name]
    del place[last]
    return value, "", json.dumps(config, sort_keys=True)


def _plain(node: Any) -> Any:
    """A copy of a configuration with parts by the names of their modules, without what decides no number."""
    if isinstance(node, list) and node and all(isinstance(item, Mapping) and "_target_" in item for item in node):
        return {item["_target_"].split(".")[-2]: _plain(item) for item in node}
    if isinstance(node, Mapping):
        return {key: _plain(value) for key, value in node.items() if key not in _SAID_ONLY}
    return node


def _line(size: str, bits: str, runs: Sequence[tuple[Value, Run]]) -> Line:
    """Draw runs of one line together; of two of one seed the later one counts."""
    seeds: dict[Value, dict[int, float]] = defaultdict(dict)
    windows: dict[Value, dict[int, Sequence[float]]] = defaultdict(dict)
    for value, run in sorted(runs, key=lambda entry: entry[1].created):
        seeds[value][run.seed] = next(number for key, number in run.metrics.items() if key.startswith(TEXT))
        windows[value][run.seed] = next((of for key, of in run.window_means.items() if key.startswith(TEXT)), ())
    values = {value: Sample(tuple(of for _, of in sorted(seeds[value].items()))) for value in sorted(seeds, key=_place)}
    return Line(size, bits, values, runs[0][1].get("eval.corpora") == ["wikitext2"], windows)


def _place(value: Value) -> tuple[bool, float, str]:
    """Numbers by size, with `none` before them and words behind."""
    if isinstance(value, str):
        return value != NONE, float("inf") if value != NONE else 0.0, value
    return True, float(value), ""


def moved(found: Sequence[Line], knob: Knob) -> Figure:
    """Draw the divergence against a setting, over the least of each line: a panel per width."""
    widths, values = sorted({line.width for line in found}), _values(found)
    canvas, axes = panels(1, len(widths), 2.5, sharey=True)
    for axis, bits in zip(axes, widths, strict=True):
        for line in (line for line in found if line.width == bits):
            least = line.values[line.least].mean
            size, _, family = line.size.partition(",")
            axis.plot(
                [values.index(value) for value in line.values],
                [sample.mean / least for sample in line.values.values()],
                color=_COLOURS[size],
                linestyle="--" if family else "-",
                marker="o" if line.chosen_on else "s",
                markerfacecolor=_COLOURS[size] if line.chosen_on else "white",
                label=f"{line.size}, {_text(line)}",
            )
        axis.set_xticks(range(len(values)), [_written(value) for value in values])
        axis.set_xlim(-0.4, len(values) - 0.6)
        axis.set_title(_setting(bits))
        axis.set_xlabel(knob.words)
    axes[0].set_ylabel("divergence over the least")
    legend_below(canvas, axes, columns=4)
    caption = (
        f"Divergence from the float model against the {knob.words}, over the least of each line; today's value is "
    )
    return Figure(f"knob-{knob.name}", caption + _written(knob.today), canvas)


def numbers(found: Sequence[Line], knob: Knob) -> Table:
    """Return the divergences themselves, with the number of runs, and where each line has its least."""
    values = _values(found)
    rows = []
    for line in found:
        cells = [Cell(line.values[value]) if value in line.values else Cell(text=DASH) for value in values]
        heads = (line.size, _setting(line.width), _text(line))
        rows.append(Row(heads, (*cells, Cell(text=_written(line.least)))))
    caption = f"Divergence on WikiText-2 against the {knob.words}: mean ± standard deviation (number of runs)"
    heads = ("size", "setting", "text", *map(_written, values), "least at")
    return Table(f"knob-{knob.name}", caption, heads, tuple(rows), number=decimals(4), counted=True)


def beside(found: Mapping[str, Sequence[Line]], knobs: Sequence[Knob], base: Value = NONE) -> Table:
    """Return how much more divergence a value has than the run of `base`: a row per line of the first knob.

    Bold: each seed is told apart by a paired test over blocks of windows, in one direction. Values of later knobs that
    are today's are the first knob's.
    """
    asked = [(knob, value) for knob in knobs for value in _values(found[knob.name])]
    asked = [(knob, value) for knob, value in asked if value != base and (knob is knobs[0] or value != knob.today)]
    by_place = {(knob.name, line.size, line.width, line.chosen_on): line for knob in knobs for line in found[knob.name]}
    rows = []
    for first in found[knobs[0].name]:
        lines_of = [by_place.get((knob.name, first.size, first.width, first.chosen_on)) for knob, _ in asked]
        cells = [Cell(text=_over(line, value, base)) for line, (_, value) in zip(lines_of, asked, strict=True)]
        if any(cell.text != DASH for cell in cells):
            rows.append(Row((first.size, _setting(first.width), _text(first)), tuple(cells)))
    heads = (f"{knob.key.rpartition('.')[2].replace('lr', 'rate')} {_written(value)}" for knob, value in asked)
    what = (
        f"with {knobs[0].name} over that without" if base == NONE else f"over that of {_written(base)} {knobs[0].name}"
    )
    caption = f"Divergence {what}, on WikiText-2 (bold: told apart by a paired test in every seed)"
    return Table(f"knob-{knobs[0].name}-{_written(base)}", caption, ("size", "setting", "text", *heads), tuple(rows))


def _over(line: Line | None, value: Value, base: Value) -> str:
    if line is None or value not in line.windows or base not in line.windows:
        return DASH
    turned, bases = line.windows[value], line.windows[base]
    tests = [
        (compare_means("kl", bases[seed], turned[seed]), fmean(bases[seed]))
        for seed in turned.keys() & bases.keys()
        if turned[seed] and bases[seed]
    ]
    if not tests:
        return DASH
    share = fmean(test.mean / of for test, of in tests)
    told = all(test.low > 0 for test, _ in tests) or all(test.high < 0 for test, _ in tests)
    return f"**{100 * share:+.1f} %**" if told else f"{100 * share:+.1f} %"


def _values(found: Iterable[Line]) -> list[Value]:
    return sorted({value for line in found for value in line.values}, key=_place)


def _setting(bits: str) -> str:
    return f"{bits[1:]} bits" if bits[1:].isdigit() else bits


def _text(line: Line) -> str:
    return "validation" if line.chosen_on else "test"


def _written(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:g}"
