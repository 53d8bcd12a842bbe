"""LQER's W4A8 in three kinds of numbers at equal bits of weights, beside what the circuits take."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lsiq.report.compact import Run, read_runs
from lsiq.tables.papers.layout import BUNDLED
from lsiq.tables.papers.lowrank import FAMILY
from lsiq.tables.papers.model_sizes import SMOLLM2, TEXTS
from lsiq.tables.papers.size_runs import check_tokens
from lsiq.tables.protocol import ROOT
from lsiq.tables.study import Sample
from lsiq.tables.table import DASH, Cell, Row, Table, decimals

# By setting of records, what its numbers are. The first three take 4.25 bits of weights.
KINDS = {
    "w4a8-mxint32": "MXINT",
    "mxfp4a8": "MXFP4, MXFP8",
    "w4a8g64-sym": "integers",
    "w4a8g64-sym, float16": "integers, float16 factors",
    "w6a8-mxint32": "MXINT, 6 bits",
    "w8a8-mxint32": "MXINT, 8 bits",
}
METHODS = ("rtn", "gptq", *FAMILY)
MODELS = (*BUNDLED, SMOLLM2)
DRAWN = ("gptq", "l2qer", "qera-approx", "qera-exact")  # the others see no calibration text


class SameBits:
    """The runs of `sweep=w4a8`; of two runs of one model, setting, method and seed the later one counts.

    Raises:
        InputError: some were measured on other tokens than others of their model.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        ordered = sorted((run for run in runs if kind(run) in KINDS), key=lambda run: run.created)
        self.runs = list({(run.model, kind(run), run.method, run.seed): run for run in ordered}.values())
        check_tokens((run.model, run) for run in self.runs)

    def of(self, model: str, setting: str, method: str) -> list[Run]:
        """Return the runs of all seeds."""
        return [run for run in self.runs if (run.model, kind(run), run.method) == (model, setting, method)]


def kind(run: Run) -> str:
    """Return the key in `KINDS`: factors beside integers are float16 unless `method.factors` says otherwise."""
    plain = run.setting != "w4a8g64-sym" or run.method not in FAMILY or run.get("method.factors") == "mxint8"
    return run.setting if plain else f"{run.setting}, float16"


def load_same_bits(folder: Path = ROOT / "analysis" / "records") -> SameBits:
    """Return the committed runs."""
    return SameBits(read_runs(folder / "w4a8.jsonl"))


def same_bits(runs: SameBits) -> Table:
    """Return excess by kind of number and method, with bits and circuit area on the first model's shapes."""
    columns = [(model, text) for model in MODELS for text in TEXTS]
    rows = []
    for setting, numbers in KINDS.items():
        for method in METHODS:
            found = [run for model in MODELS for run in runs.of(model, setting, method)]
            if not found:
                continue
            cells = [_number(found[0].average_bits), _number(found[0].relative_area)]
            cells += [_excess(runs.of(model, setting, method), text) for model, text in columns]
            rows.append(Row((numbers, method), tuple(cells), numbers))
    caption = "Excess in nats at W4A8 by kind of number: mean ± standard deviation (seeds)"
    heads = ("numbers", "method", "bits", "area", *(f"{model}, {TEXTS[text]}" for model, text in columns))
    return Table("lqer-w4a8-kinds", caption, heads, tuple(rows), number=decimals(4), counted=True)


def _excess(found: list[Run], text: str) -> Cell:
    if not found:
        return Cell(text=DASH)
    return Cell(Sample(tuple(run.metrics[f"excess/{text}@512"] for run in found), found[0].method not in DRAWN))


def _number(value: float | None) -> Cell:
    return Cell(text=DASH if value is None else f"{value:.2f}")
