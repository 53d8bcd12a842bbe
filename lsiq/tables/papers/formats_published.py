"""What others print of small floating-point numbers, over what rounding to nearest loses there, and ours beside."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from lsiq.report.compact import Run, read_runs
from lsiq.tables.papers.formats import MODELS, FormatRuns
from lsiq.tables.papers.layout import CORPORA
from lsiq.tables.papers.model_sizes import TEXTS
from lsiq.tables.papers.size_runs import check_tokens, reports
from lsiq.tables.protocol import ROOT
from lsiq.tables.published import MARKS, Literature
from lsiq.tables.table import DASH, Cell, Row, Table

# Columns, and the methods that stand there; those of runs come last.
COLUMNS = {
    "smoothquant": ("smoothquant",),
    "awq": ("awq",),
    "gptq": ("gptq",),
    "rotated in blocks": ("blocks-rtn",),
    "rotated in blocks, gptq": ("blocks-gptq", "rotate+gptq"),
    "rounding learned": ("learned-round", "autoround"),
}
# Methods that stand in words in the last column.
OTHERS = {
    "quarot": "QuaRot",
    "quarot+gptq": "QuaRot and gptq",
    "quarot+learned-round": "QuaRot and rounding learned",
    "spinquant": "SpinQuant",
    "spinquant+gptq": "SpinQuant and gptq",
    "spinquant+learned-round": "SpinQuant and rounding learned",
    "hip": "HIP",
    "hip+gptq": "HIP and gptq",
    "hip+learned-round": "HIP and rounding learned",
    "blocks-autoround": "rotated in blocks and rounding learned",
    "autoround-ext": "alg_ext",
    "qat": "trained",
    "blocks-qat": "rotated in blocks and trained",
    "4over6": "4/6",
    "razer": "RaZeR",
    "focus": "FOCUS",
    "omniquant": "omniquant",
    "lsi": "lsi",
    "best": "best",
}
# The mean over four tasks moves by 0.3 points from seed to seed (MR-GPTQ): of smaller losses no shares are made.
LEAST_POINTS = 1.0
FORMATS = ("fp8", "mxfp8", "mxfp6", "w4a16-nvfp4", "w4a16-mxfp4", "nvfp4", "mxfp4")
HEADS = ("model", "measured by", "of")


def beside(literature: Literature, runs: FormatRuns, setting: str) -> Table:
    """Return what methods leave of rounding's loss at one format: a row per publication and model, then ours."""
    rows = []
    for name, rounded in ((setting, "both"), (f"w4a16-{setting}", "weights")):
        lines = [line for line in literature.formats if line["setting"] == name]
        rows += [_published(group, rounded) for group in _groups(lines, "place") if _counts(group)]
    rows += [_ours(runs, setting, model, text) for model in MODELS for text in TEXTS]
    caption = f"{setting}: share of rounding's loss that each method leaves, as published and here"
    heads = (*HEADS, "rounded", "rtn loses", *COLUMNS, "others")
    return Table(f"formats-published-{setting}", caption, heads, tuple(rows))


def losses(literature: Literature, records: Iterable[Run]) -> Table:
    """Return what rounding to nearest loses by format, where three formats and more were measured alike."""
    rounded = [line for line in literature.formats if line["method"] == "rtn"]
    found = [
        (
            (group[0]["model"], group[0]["source"], _measure(group[0]["metric"]), _unit(group[0]["metric"])),
            {line["setting"]: f"{_loss(line):.3g}" + MARKS[line["trust"]] for line in group},
        )
        for group in _groups(rounded)
    ]
    rows = [
        Row(labels, tuple(Cell(text=texts.get(name, DASH)) for name in FORMATS))
        for labels, texts in [*found, *_rounded_here(records)]
        if len(texts) >= 3
    ]
    caption = "What rounding to nearest loses by format, as published and here"
    return Table("formats-losses", caption, (*HEADS, "unit", *FORMATS), tuple(rows))


def load_records(folder: Path = ROOT / "analysis" / "records") -> list[Run]:
    """Return the committed runs, also those that the tables of methods leave out."""
    return list(read_runs(folder / "formats.jsonl"))


def _groups(lines: Sequence[dict[str, str]], *also: str) -> list[list[dict[str, str]]]:
    """Return the lines that were measured alike, together: one float model's, by one measure."""
    keys = ("source", *also, "model", "metric", "float")
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for line in lines:
        groups.setdefault(tuple(line[key] for key in keys), []).append(line)
    return list(groups.values())


def _counts(group: Sequence[dict[str, str]]) -> bool:
    """Whether there are shares to show: another method beside rounding, and a loss that is no chance."""
    rtn = _of(group, "rtn")
    return len(group) > 1 and (rtn["metric"].startswith("ppl/") or _loss(rtn) >= LEAST_POINTS)


def _published(group: Sequence[dict[str, str]], rounded: str) -> Row:
    rtn = _of(group, "rtn")
    shares = {line["method"]: f"{_loss(line) / _loss(rtn):.2f}{MARKS[line['trust']]}" for line in group if line != rtn}
    source = f"{rtn['source']}, {rtn['place']}"
    loss = f"{_loss(rtn):.3g} {_unit(rtn['metric'])}"
    return _row((rtn["model"], source, _measure(rtn["metric"]), rounded, loss), shares)


def _ours(runs: FormatRuns, setting: str, model: str, text: str) -> Row:
    rtn = runs.measured(model, setting, "rtn", text)
    assert rtn is not None
    methods = [*(names[-1] for names in COLUMNS.values()), *OTHERS]
    samples = {method: runs.share(model, setting, method, text) for method in methods}
    shares = {method: f"{sample.mean:.2f}" for method, sample in samples.items() if sample is not None}
    return _row((model, "here", TEXTS[text], "both", f"{rtn.mean:.3g} nats"), shares)


def _row(labels: tuple[str, ...], shares: dict[str, str]) -> Row:
    found = [next((shares[name] for name in names if name in shares), DASH) for names in COLUMNS.values()]
    others = "; ".join(f"{words} {shares[name]}" for name, words in OTHERS.items() if name in shares)
    return Row(labels, tuple(Cell(text=text) for text in (*found, others or DASH)))


def _rounded_here(records: Iterable[Run]) -> list[tuple[tuple[str, ...], dict[str, str]]]:
    """Return our losses on texts that choose settings, by model and text."""
    rounded = [run for run in records if run.method == "rtn" and run.setting in FORMATS and not reports(run)]
    check_tokens((run.model, run) for run in rounded)
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for run in rounded:
        for corpus, words in (("bundled", "bundled text"), ("wikitext2", "WikiText-2 validation")):
            excess = run.metrics.get(f"excess/{corpus}@512")
            if excess is not None:
                rows.setdefault((run.model, "here", words, "nats"), {})[run.setting] = f"{excess:.3g}"
    return [(labels, texts) for labels, texts in sorted(rows.items())]


def _of(group: Sequence[dict[str, str]], method: str) -> dict[str, str]:
    (line,) = (line for line in group if line["method"] == method)
    return line


def _loss(line: dict[str, str]) -> float:
    """Return what a line's model lost against float: points of accuracy, or nats where perplexities are compared."""
    value, reference = float(line["value"]), float(line["float"])
    return math.log(value / reference) if line["metric"].startswith("ppl/") else reference - value


def _unit(metric: str) -> str:
    if metric.endswith("-word"):
        return "nats per word"
    return "nats" if metric.startswith("ppl/") else "points"


def _measure(metric: str) -> str:
    """Return what was measured: a corpus, a task, or how many tasks a mean is over."""
    kind, _, name = metric.partition("/")
    if kind == "ppl":
        return CORPORA[name.partition("@")[0].removesuffix("-word")]
    tasks = name.split("+")
    return tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
