"""Perplexity tables: model by setting by method, ours beside the published."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from lsiq.tables.papers.layout import (
    ALWAYS,
    BESIDE,
    BUNDLED,
    CORPORA,
    FAMILIES,
    METHODS,
    OTHERS,
    study_jobs,
    study_methods,
)
from lsiq.tables.protocol import AUGMENTED, PAPERS, STUDY, Job, Protocol
from lsiq.tables.published import Literature
from lsiq.tables.study import Runs
from lsiq.tables.table import EQUAL_BITS, Cell, Row, Table, best_in_bold, decimals

# Behind the names of methods that calibrated on more than the others.
MORE_TEXT = ", augmented"


def bundled_perplexity(
    runs: Runs,
    settings: Sequence[str],
    name: str,
    caption: str,
    measure: str = "ppl",
    methods: Sequence[str] = (),
    gaps: bool = True,
) -> Table:
    """Return the study's table of the bundled models: a row per setting and method, a column per model and corpus.

    A method that was also calibrated on augmented text has a second row, as far as measured, which does not compete.
    Runs beside the study (`BESIDE`) have the last rows of their setting.

    Args:
        measure: ppl, or excess: its logarithm over the float model's.
        methods: the rows of each setting; by default all of the study and the float model.
        gaps: whether rows without a number stay, with the commands that measure them.
    """
    columns = _measured_columns(runs, measure)
    names = list(methods) or ["fp16", *study_methods(settings)]
    rows: list[Row] = []
    if names[0] == "fp16":
        cells = _samples(runs, STUDY, columns, "fp16", "fp16", measure)
        rows.append(Row(("float", "fp16", "16"), cells, "fp16", False))
    for setting in settings:
        rows += _setting_rows(runs, columns, setting, names[names[0] == "fp16" :], measure)
    rows = [row for row in rows if gaps or any(cell.sample for cell in row.cells)]
    heads = ("setting", "method", "bits", *(f"{model}, {CORPORA[corpus.split('@')[0]]}" for model, corpus in columns))
    digits = 2 if measure == "ppl" else 3
    return Table(
        name,
        caption,
        heads,
        best_in_bold(rows),
        number=decimals(digits),
        commands=_commands(_missing(rows, columns)) if gaps else (),
    )


def _setting_rows(
    runs: Runs, columns: Sequence[tuple[str, str]], setting: str, methods: Sequence[str], measure: str
) -> list[Row]:
    methods = [m for m in methods if any((model, setting, m) in study_jobs() for model in BUNDLED)]
    bits = {method: average_bits(runs, setting, method) for method in methods}
    fewest = min((value for value in bits.values() if value is not None), default=0.0)

    def competes(spent: float | None) -> bool:
        return spent is None or spent <= EQUAL_BITS * fewest

    rows = []
    for method, spent in bits.items():
        cells = _samples(runs, STUDY, columns, setting, method, measure)
        rows.append(Row((setting, method, _bits_text(spent)), cells, setting, competes(spent)))
        if had_more_text(runs, [setting], method):
            cells = _samples(runs, AUGMENTED, columns, setting, method, measure)
            spent = average_bits(runs, setting, method, AUGMENTED)
            rows.append(Row((setting, method + MORE_TEXT, _bits_text(spent)), cells, setting, competes=False))
    for row in (row for row in BESIDE if row.setting == setting):
        cells = _samples(runs, row.protocol, columns, setting, row.method, measure, wanted=False)
        if any(cell.sample for cell in cells):
            spent = average_bits(runs, setting, row.method, row.protocol)
            rows.append(Row((setting, row.label, _bits_text(spent)), cells, setting, competes(spent)))
    return rows


def had_more_text(runs: Runs, settings: Iterable[str], method: str) -> bool:
    """Whether the method was also run with augmented calibration text, in any of the settings."""
    return any(runs.find(AUGMENTED, model, setting, method) for model in BUNDLED for setting in settings)


def average_bits(runs: Runs, setting: str, method: str, protocol: Protocol = STUDY) -> float | None:
    """Return the bits per weight that the method spends, the mean over the bundled models; None where unknown."""
    means = [runs.mean(protocol, model, setting, method, lambda run: run.average_bits) for model in BUNDLED]
    values = [value for value in means if value is not None]
    return statistics.fmean(values) if values else None


def hub_perplexities(
    runs: Runs,
    literature: Literature,
    settings: Sequence[str],
    name: str,
    corpora: Iterable[str] = ("wikitext2", "ptb", "c4"),
    always: Sequence[str] = ALWAYS,
) -> list[Table]:
    """Return a table per family and corpus for the hub's models, each cell with ours and the published number.

    One run measures all three corpora, so the commands stand under the first table of a family.

    Args:
        always: methods that have a row even where no paper printed a number.
    """
    tables = []
    for family, models in FAMILIES.items():
        has_jobs = False
        for corpus in corpora:
            rows = _hub_rows(runs, literature, models, settings, corpus, always)
            if not any(cell.published or cell.sample for row in rows[1:] for cell in row.cells):
                continue
            jobs = [] if has_jobs else _hub_jobs(rows, models)
            has_jobs = True
            tables.append(
                Table(
                    f"{name}-{corpus}-{family.split()[0].lower()}",
                    f"{CORPORA[corpus]}, {family}: ours / published",
                    ("setting", "method", *models),
                    best_in_bold(rows),
                    beside=True,
                    commands=PAPERS.commands(jobs),
                    folded=True,
                )
            )
    return tables


def _hub_rows(
    runs: Runs,
    literature: Literature,
    models: Sequence[str],
    settings: Sequence[str],
    corpus: str,
    always: Sequence[str],
) -> list[Row]:
    rows = []
    for setting, method in [("fp16", "fp16"), *((s, m) for s in settings for m in (*METHODS[1:], *OTHERS))]:
        cells = tuple(
            Cell(
                runs.sample(PAPERS, model, setting, method, f"ppl/{corpus}@2048"),
                literature.perplexity(model, setting, method, corpus),
                wanted=method not in OTHERS,
            )
            for model in models
        )
        if method in ("fp16", *always) or any(cell.sample or cell.published for cell in cells):
            rows.append(Row((setting, method), cells, setting))
    return rows


def _hub_jobs(rows: Sequence[Row], models: Sequence[str]) -> list[Job]:
    """The runs that would fill empty cells; the float model is measured beside any of them."""
    return [
        (model, row.labels[0], row.labels[1])
        for row in rows
        for model, cell in zip(models, row.cells, strict=True)
        if cell.wanted and cell.sample is None and row.labels[1] != "fp16"
    ]


def _measured_columns(runs: Runs, measure: str) -> list[tuple[str, str]]:
    """Model and corpus with its length, as far as any run of the study measured them; bundled text always."""
    keys = {"bundled@512"}
    for run in runs.runs:
        if run.model in BUNDLED and runs.follows(run, STUDY):
            keys |= {key.partition("/")[2] for key in run.metrics if key.startswith(f"{measure}/")}
    order = list(CORPORA)
    ordered = sorted(
        (key for key in keys if key.split("@")[0] in order), key=lambda key: order.index(key.split("@")[0])
    )
    return [(model, key) for model in BUNDLED for key in ordered]


def _samples(
    runs: Runs,
    protocol: Protocol,
    columns: Sequence[tuple[str, str]],
    setting: str,
    method: str,
    measure: str,
    wanted: bool = True,
) -> tuple[Cell, ...]:
    samples = (runs.sample(protocol, model, setting, method, f"{measure}/{corpus}") for model, corpus in columns)
    return tuple(Cell(sample, wanted=wanted) for sample in samples)


def _bits_text(bits: float | None) -> str:
    return "" if bits is None else f"{bits:.2f}"


def _commands(jobs: Sequence[Job]) -> list[str]:
    """The commands that carry out the jobs, whose methods are named as in the rows."""
    more = [(model, setting, name.removesuffix(MORE_TEXT)) for model, setting, name in jobs if name.endswith(MORE_TEXT)]
    return STUDY.commands(job for job in jobs if not job[2].endswith(MORE_TEXT)) + AUGMENTED.commands(more)


def _missing(rows: Sequence[Row], columns: Sequence[tuple[str, str]]) -> list[Job]:
    jobs = {
        (model, row.labels[0], row.labels[1]): None
        for row in rows
        for (model, _), cell in zip(columns, row.cells, strict=True)
        if cell.wanted and cell.sample is None and row.labels[1] != "fp16"
    }
    return list(jobs)
