"""What methods make of SmolLM2-135M by the published protocol, and AutoRound's package beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lsiq.report.compact import Run, read_runs
from lsiq.results.record import origin_note
from lsiq.tables.papers.size_runs import PACKAGE, PACKAGE_LONGER, beside_lsi, check_tokens, excess_over
from lsiq.tables.protocol import ROOT
from lsiq.tables.study import Sample, measured
from lsiq.tables.table import DASH, Cell, Row, Table, decimals

MODEL = "smollm2-135m"
WEIGHTS = ("w2a16g64", "w3a16g64", "w4a16g64")
MXINT = ("w2a8-mxint", "w3a8-mxint", "w4a8-mxint")
ACTIVATIONS = ("w4a8", "w4a4")
# The first was measured on the tokens as they were cut before, the others on those of today. The last has weights alone
# once more: some of the methods, so that tables of all methods leave them out.
BEFORE = ROOT / "analysis" / "records" / "smollm2.jsonl"
TODAY = ROOT / "analysis" / "records" / "smollm2-activations.jsonl"
AGAIN = ROOT / "analysis" / "repeats" / "smollm2-weights.jsonl"
MORE_TEXT = ROOT / "analysis" / "repeats" / "smollm2-text.jsonl"  # 2048 sequences for 512
# By label of the runs, rows that no method's file makes.
VARIANTS = {
    "oq3e-1": "omniquant, clipping at 3e-1",
    **beside_lsi(34),
    "best-1e-2": "best, blocks at 1e-2",
    "best-again": "best, newer cut",
    "best-both": "best, newer cut, relative to both",
    "best-2": "best, two epochs",
    "best-before": "best before",
}
METHODS = ("rtn", "gptq", "awq", "smoothquant", "rotate+gptq", "omniquant", VARIANTS["oq3e-1"], "sde", "lsi-diagonal",
           VARIANTS["diag-cl"], VARIANTS["corner34"], VARIANTS["corner34-cl"], VARIANTS["sde1"], VARIANTS["sde1-cl"],
           "autoround", PACKAGE, PACKAGE_LONGER, "lsi", "best", VARIANTS["best-before"], VARIANTS["best-1e-2"],
           VARIANTS["best-again"], VARIANTS["best-both"], VARIANTS["best-2"], "best-10", "best-float32", "best-let",
           "l2qer")  # fmt: skip
# The package's checkpoints were evaluated as models of their own: by name, the setting and the row.
PACKAGES = {
    f"ar-w{bits}-{iterations}": (f"w{bits}a16g64", row)
    for bits in (2, 3, 4)
    for iterations, row in ((200, PACKAGE), (1000, PACKAGE_LONGER))
} | {f"ar-smol-w{bits}-200-2048": (f"w{bits}a16g64", PACKAGE) for bits in (2, 3, 4)}
ACCURACY = "acc/mean6"
COLUMNS = {
    "excess/file@2048": "excess, C4",
    "excess/wikitext2@2048": "excess, WikiText-2",
    "kl/file@2048": "divergence, C4",
    "kl/wikitext2@2048": "divergence, WikiText-2",
    ACCURACY: "accuracy",
}


class ProtocolRuns:
    """The runs of one model and protocol, by setting and method.

    Raises:
        InputError: some were measured on other tokens, as before GGUF's `smollm` was read, than others.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        ordered = sorted(runs, key=lambda run: run.created)
        self.runs = list({(run.model, run.setting, run.method, run.seed): run for run in ordered}.values())
        check_tokens((MODEL, run) for run in self.runs)
        self.base = next(run for run in self.runs if run.model == MODEL)
        self.notes = (origin_note(MODEL, "GGUF Q4_1"),)

    def sample(self, setting: str, method: str, metric: str) -> Sample | None:
        """Return what the seeds measured; rounding to nearest draws nothing."""
        values = [
            value
            for run in self.runs
            if (_setting(run), _method(run)) == (setting, method) and (value := self._measured(run, metric)) is not None
        ]
        return Sample(tuple(values), method == "rtn", self.notes) if values else None

    def bits(self, setting: str, method: str) -> float | None:
        """Return the average bits per weight; what a package made is recorded as a float model, which has none."""
        found = (run for run in self.runs if (_setting(run), _method(run)) == (setting, method))
        return next((run.average_bits for run in found if run.model == MODEL), None)

    def _measured(self, run: Run, metric: str) -> float | None:
        if run.model == MODEL:
            return measured(run, metric)
        # What the package made is the float model of its own evaluation.
        return measured(run, ACCURACY, "float/") if metric == ACCURACY else excess_over(self.base, run).get(metric)


def load_protocol_runs(file: Path = BEFORE) -> ProtocolRuns:
    """Return the committed runs of SmolLM2 by the published protocol, of one file."""
    return ProtocolRuns(read_runs(file))


def by_setting(runs: ProtocolRuns, name: str, settings: Sequence[str]) -> Table:
    """Return a table of all methods that were run in some settings; the first row has the float model's accuracy."""
    accuracy = measured(runs.base, ACCURACY, "float/")
    float_model = Cell(text=DASH) if accuracy is None else Cell(Sample((accuracy,), True, runs.notes))
    rows = [Row(("float", ""), (*(Cell(text="") for _ in range(len(COLUMNS))), float_model))]
    for setting in settings:
        for method in METHODS:
            samples = [runs.sample(setting, method, metric) for metric in COLUMNS]
            if any(samples):
                bits = runs.bits(setting, method)
                cells = tuple(Cell(sample) if sample is not None else Cell(text=DASH) for sample in samples)
                first = Cell(text="") if bits is None else Cell(text=f"{bits:.2f}")
                rows.append(Row((setting, method), (first, *cells), setting))
    caption = "SmolLM2-135M: excess loss and divergence in nats, windows of 2048; mean accuracy on six tasks"
    heads = ("setting", "method", "bits", *COLUMNS.values())
    return Table(name, caption, heads, tuple(rows), number=decimals(3), counted=True)


def _setting(run: Run) -> str:
    return PACKAGES[run.model][0] if run.model in PACKAGES else run.setting


def _method(run: Run) -> str:
    return PACKAGES[run.model][1] if run.model in PACKAGES else VARIANTS.get(run.method, run.method)
