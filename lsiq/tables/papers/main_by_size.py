"""The main table: today's methods by size of model, each column measured in one way, which the table's notes say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from lsiq.tables.papers.layout import BUNDLED, rank
from lsiq.tables.papers.model_sizes import SIZES, TEXTS, Size
from lsiq.tables.papers.size_runs import SizeRuns
from lsiq.tables.protocol import STUDY
from lsiq.tables.study import Runs, Sample
from lsiq.tables.table import DASH, Cell, Row, Table, decimals

MEASURES = {"excess": "Excess loss", "kl": "Divergence from the float model"}


@dataclass(frozen=True)
class Part:
    """A half of the main table.

    Attributes:
        settings: those of the rows, and the number of decimals that they are written with.
        methods: the rows of each setting, as far as any column has a number.
    """

    name: str
    words: str
    settings: dict[str, int]
    methods: tuple[str, ...]


WEIGHTS = Part(
    "weights",
    "weights in groups",
    {"w2": 3, "w3": 4, "w4": 4},
    ("rtn", "gptq", "awq", "omniquant", "lsi-diagonal", "lsi-corner", "lsi", "sde", "autoround", "dense", "best"),
)
ACTIVATIONS = Part(
    "activations",
    "activations too",
    {"w4a4": 3, "w4a8": 3, "w4a8-mxint": 3},
    (*WEIGHTS.methods, "smoothquant", "rotate", "rotate+gptq", "duquant", "l2qer"),
)


@dataclass(frozen=True)
class Column:
    """A size of model measured in one way: `sample` and `bits` answer by setting and method."""

    head: str
    sample: Callable[[str, str], Sample | None]
    bits: Callable[[str, str], float | None]


def main_by_size(
    sizes: SizeRuns, runs: Runs, part: Part, measure: str = "excess", text: str = "wikitext2", folded: bool = False
) -> Table:
    """Return a row per setting and method and a column per size, which is of one model.

    A bundled model that has no runs of the part by the protocol of `sizes` has its column from the study.
    """
    columns: list[Column] = []
    sizes = sizes.of_one_training()
    for size in SIZES:
        candidates = [_of_sizes(sizes, size, part, measure, text)]
        candidates += [_of_study(runs, size, model, part, measure, text) for model in BUNDLED if model in size.models]
        columns += [column for column in candidates if _has_numbers(column, part)][:1]
    rows = []
    for setting, digits in part.settings.items():
        for method in sorted(part.methods, key=rank):
            samples = [column.sample(setting, method) for column in columns]
            if any(samples):
                cells = tuple(Cell(sample) if sample is not None else Cell(text=DASH) for sample in samples)
                bits = _range(column.bits(setting, method) for column in columns)
                rows.append(Row((setting, method, bits), cells, setting, number=decimals(digits)))
    caption = (
        f"{MEASURES[measure]} by model size, {TEXTS[text]}, {part.words}: mean ± standard deviation (number of runs)"
    )
    heads = ("setting", "method", "bits", *(column.head for column in columns))
    return Table(f"main-{part.name}-{measure}-{text}", caption, heads, tuple(rows), folded=folded, counted=True)


def _has_numbers(column: Column, part: Part) -> bool:
    return any(column.sample(setting, method) for setting in part.settings for method in part.methods)


def _of_sizes(sizes: SizeRuns, size: Size, part: Part, measure: str, text: str) -> Column:
    points = [point for setting in part.settings for point in sizes.of(size.name, setting)]
    names = ", ".join(sorted({point.model[0] for point in points if point.model}))
    groups = f"groups of {size.group}, " if part is WEIGHTS else ""
    values = (point.metrics.get(f"float/ppl/{text}@{size.seqlen}") for point in points)
    note = f"{size.name} ({names}): {groups}{size.words({point.dtype for point in points})}; {_float_model(values)}"

    def sample(setting: str, method: str) -> Sample | None:
        return _noted(sizes.sample(size.name, setting, method, f"{measure}/{text}"), note)

    def bits(setting: str, method: str) -> float | None:
        return next((point.bits for point in sizes.of(size.name, setting, method)), None)

    return Column(size.name, sample, bits)


def _of_study(runs: Runs, size: Size, model: str, part: Part, measure: str, text: str) -> Column:
    key = f"{text}@512"
    float_model = runs.sample(STUDY, model, "fp16", "fp16", f"ppl/{key}")
    head = f"{size.name} (study)"
    groups = "groups of 128, " if part is WEIGHTS else ""
    values = () if float_model is None else float_model.values
    note = (
        f"{head}: {model} calibrated on 128 × 512 tokens of bundled text; {groups}the whole text in windows of 512; "
        f"{_float_model(values)}"
    )

    def sample(setting: str, method: str) -> Sample | None:
        return _noted(runs.sample(STUDY, model, _study_setting(setting), method, f"{measure}/{key}"), note)

    def bits(setting: str, method: str) -> float | None:
        return runs.mean(STUDY, model, _study_setting(setting), method, lambda run: run.average_bits)

    return Column(head, sample, bits)


def _study_setting(setting: str) -> str:
    return f"{setting}a16g128" if setting in WEIGHTS.settings else setting


def _noted(sample: Sample | None, note: str) -> Sample | None:
    return None if sample is None else replace(sample, notes=(f"{note}.", *sample.notes))


def _float_model(perplexities: Iterable[float | None]) -> str:
    texts = sorted({f"{value:.1f}" for value in perplexities if value is not None})
    return f"float perplexity {' and '.join(texts)}"


def _range(bits: Iterable[float | None]) -> str:
    texts = [f"{value:.2f}" for value in sorted(value for value in bits if value is not None)]
    return "–".join(dict.fromkeys((texts[0], texts[-1]))) if texts else ""
