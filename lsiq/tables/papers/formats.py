"""What methods leave of rounding's excess where weights and activations are 4-bit floating-point numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lsiq.experiment.composed import WIDE
from lsiq.report.compact import Run, read_runs
from lsiq.tables.papers.layout import BUNDLED
from lsiq.tables.papers.model_sizes import TEXTS
from lsiq.tables.papers.size_runs import check_tokens, reports
from lsiq.tables.protocol import ROOT
from lsiq.tables.study import Sample
from lsiq.tables.table import DASH, Cell, Row, Table, decimals

SETTINGS = ("mxfp4", "nvfp4")
MODELS = (*BUNDLED, "llama-90m", "smollm2-135m")
PLAIN, SLOWER = "best without rotation", "best without rotation, end at 4e-3 in bfloat16"
LET = "best with scales where norms take no shifts"
SLOWER_RATE = 4e-3
WORDS = {"excess": "excess", "kl": "divergence"}
METHODS = ("smoothquant", "awq", "gptq", "rotate+gptq", "omniquant", "autoround", "lsi", "best", LET, PLAIN, SLOWER)


class FormatRuns:
    """The runs on the two reported texts, by model, setting and row.

    Raises:
        InputError: some were measured on other tokens than others of their model.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        ordered = sorted((run for run in runs if reports(run)), key=lambda run: run.created)
        self.runs = list({(run.model, run.setting, row(run), run.seed): run for run in ordered}.values())
        check_tokens((run.model, run) for run in self.runs)

    def measured(self, model: str, setting: str, method: str, text: str, measure: str = "excess") -> Sample | None:
        """Return the excess loss or the divergence (`kl`) of all seeds; rounding to nearest draws nothing."""
        key = f"{measure}/{text}@512"
        found = [run for run in self.runs if (run.model, run.setting, row(run)) == (model, setting, method)]
        return Sample(tuple(run.metrics[key] for run in found), method == "rtn") if found else None

    def share(self, model: str, setting: str, method: str, text: str, measure: str = "excess") -> Sample | None:
        """Return the same over that of rounding to nearest."""
        base = self.measured(model, setting, "rtn", text, measure)
        sample = self.measured(model, setting, method, text, measure)
        if base is None or sample is None:
            return None
        return Sample(tuple(value / base.mean for value in sample.values), sample.exact)


def load_format_runs(folder: Path = ROOT / "analysis" / "records") -> FormatRuns:
    """Return the committed runs."""
    return FormatRuns(read_runs(folder / "formats.jsonl"))


def row(run: Run) -> str:
    """Return the row of a run: what was called best without rotating is today's best in narrow blocks alone."""
    if run.method == "best-let":
        return LET
    if not run.method.startswith("best") or run.get("method.start.label") != "best-blocks":
        return run.method
    if run.get("method.part.lr") == SLOWER_RATE:
        return SLOWER
    return "best" if run.get("quant.activation.block") < WIDE else PLAIN


def by_format(runs: FormatRuns, text: str, measure: str = "excess") -> Table:
    """Return a row per method and a column per format and model, on one text; the first row is in nats."""
    word = WORDS[measure]
    columns = [(model, setting) for setting in SETTINGS for model in MODELS]

    def cells(samples: Iterable[Sample | None]) -> tuple[Cell, ...]:
        return tuple(Cell(text=DASH) if sample is None else Cell(sample) for sample in samples)

    rounded = cells(runs.measured(*column, "rtn", text, measure) for column in columns)
    rows = [Row((f"rtn, {word} in nats",), rounded)]
    for method in METHODS:
        shares = [runs.share(*column, method, text, measure) for column in columns]
        if any(shares):
            rows.append(Row((method,), cells(shares), number=decimals(2)))
    caption = f"What is left of the {word} of rounding to nearest, {TEXTS[text]}: mean ± standard deviation (seeds)"
    heads = ("method", *(f"{setting}, {model}" for model, setting in columns))
    name = f"formats-{text}" if measure == "excess" else f"formats-{measure}-{text}"
    return Table(name, caption, heads, tuple(rows), number=decimals(4), counted=True)
