"""Ablations: one setting varies, everything else stays as in the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lsiq.tables.papers.layout import CORPORA
from lsiq.tables.protocol import STUDY, Protocol
from lsiq.tables.study import Runs
from lsiq.tables.table import Cell, Row, Table, best_in_bold, decimals

MODEL, SETTING = "tiny-llama", "w2a16g128"
METRICS = ("excess/bundled@512", "excess/wikitext2@512")
BATCHES, RATES = (1, 2, 4, 8, 16), (3.5e-4, 7e-4, 1.4e-3)
PARTS = ("lwc", "omniquant", "lsi-only", "lsi-random", "lsi-corner", "sde", "autoround", "dense")


@dataclass(frozen=True)
class Axis:
    """A setting that a study varies, and for which methods."""

    sweep: str
    caption: str
    key: str
    values: tuple[Any, ...]
    methods: tuple[str, ...]


CORNER = ("lsi-corner",)
AXES = (
    Axis(
        "ablation-width",
        "Width of SDE's band beside a corner of 300 (0: lsi-corner)",
        "method.parts.expansion.width",
        (0, 1, 2, 8),
        ("sde",),
    ),
    Axis(
        "ablation-ahead",
        "Blocks that the loss looks ahead",
        "method.training.ahead.blocks",
        (0, 1, 2),
        ("lsi-corner", "sde"),
    ),
    Axis(
        "ablation-samples",
        "Calibration sequences of 512 tokens",
        "calib.samples",
        (8, 16, 32, 64, 128),
        CORNER,
    ),
    Axis(
        "ablation-corpus",
        "Calibration text",
        "calib.corpus",
        ("bundled", "stories", "science", "history", "craft"),
        CORNER,
    ),
    Axis("ablation-epochs", "Epochs", "method.training.epochs", (1, 2, 5, 10, 20, 40), CORNER),
)


def parts(runs: Runs) -> Table:
    """Return what each set of parts leaves of the loss."""
    keys = METRICS
    rows, missing = list[Row](), []
    for method in PARTS:
        cells = tuple(Cell(runs.sample(STUDY, MODEL, SETTING, method, key), wanted=True) for key in keys)
        rows.append(Row((method,), cells))
        if any(cell.sample is None for cell in cells):
            missing.append(method)
    return Table(
        "ablation-parts",
        f"Learned parts, {MODEL} {SETTING}: excess loss",
        ("method", *_corpora(keys)),
        best_in_bold(rows),
        number=decimals(3),
        commands=[f"python run.py sweep=ablation-parts method={','.join(missing)}"] if missing else (),
    )


def ablation(runs: Runs, axis: Axis) -> Table:
    """Return the excess loss by the values of an axis."""
    return axis_table(
        runs,
        axis.sweep,
        f"{axis.caption}; {MODEL} {SETTING}: excess loss",
        axis.key,
        axis.values,
        [(method, SETTING) for method in axis.methods],
    )


def along(runs: Runs, axis: Axis, metric: str) -> list[tuple[Any, Sequence[float]]]:
    """Return the values of the axis that its first method was measured at, each with a number per seed."""
    protocol, method = free(axis.key), axis.methods[0]
    samples = ((v, runs.sample(protocol, MODEL, SETTING, method, metric, {axis.key: v})) for v in axis.values)
    return [(value, sample.values) for value, sample in samples if sample is not None]


def free(key: str) -> Protocol:
    """The study's protocol with one setting left free."""
    return replace(STUDY, varied=(key,))


def batches(runs: Runs) -> Table:
    """Return the excess loss of lsi-corner by the size of a batch and the rate of the increments, in as many epochs."""
    batch, rate = "method.training.batch", "method.parts.singular.lr"
    protocol = replace(STUDY, varied=(batch, rate))
    rows, missing = list[Row](), list[int]()
    for size in BATCHES:
        for metric in METRICS:
            samples = (
                runs.sample(protocol, MODEL, SETTING, "lsi-corner", metric, {batch: size, rate: r}) for r in RATES
            )
            cells = tuple(Cell(sample, wanted=True) for sample in samples)
            rows.append(Row((str(size), *_corpora([metric])), cells))
            missing += [size] * any(cell.sample is None for cell in cells)
    listed = ",".join(str(size) for size in dict.fromkeys(missing))
    return Table(
        "ablation-batch",
        f"Sequences in a batch, and the rate of the increments; lsi-corner, {MODEL} {SETTING}: excess loss",
        ("batch", "text", *(f"{r:.1e}" for r in RATES)),
        tuple(rows),
        number=decimals(3),
        commands=[f"python run.py sweep=ablation-batch {batch}={listed}"] if missing else (),
    )


def axis_table(
    runs: Runs,
    sweep: str,
    caption: str,
    key: str,
    values: Sequence[Any],
    methods: Sequence[tuple[str, str]],
    bits: bool = False,
) -> Table:
    """Return excess losses with the values of a setting as columns, and a row per method and corpus.

    Args:
        methods: each with its number format.
        bits: whether columns of average bits follow.
    """
    protocol, metrics = free(key), METRICS
    rows, missing = list[Row](), set[Any]()
    for method, setting in methods:
        for metric in metrics:
            cells = [Cell(runs.sample(protocol, MODEL, setting, method, metric, {key: v}), wanted=True) for v in values]
            rows.append(Row((method, *_corpora([metric])), tuple(cells)))
            missing |= {value for value, cell in zip(values, cells, strict=True) if cell.sample is None}
        if bits:
            rows.append(Row((method, "bits"), tuple(_bits(runs, protocol, setting, method, {key: v}) for v in values)))
    listed = ",".join(str(value) for value in values if value in missing)
    return Table(
        sweep,
        caption,
        ("method", "text", *(str(value) for value in values)),
        tuple(rows),
        number=decimals(3),
        commands=[f"python run.py sweep={sweep} {key}={listed}"] if missing else (),
    )


def _bits(runs: Runs, protocol: Protocol, setting: str, method: str, where: Mapping[str, Any]) -> Cell:
    bits = [run.average_bits for run in runs.find(protocol, MODEL, setting, method, where)]
    return Cell(text=f"{bits[0]:.2f}" if bits and bits[0] is not None else "")


def _corpora(metrics: Sequence[str]) -> list[str]:
    return [CORPORA[metric.partition("/")[2].split("@")[0]] for metric in metrics]
