"""Whether one run is better than another, or the difference is noise: the intervals of `lsiq compare`.

Both runs must have read the same windows (and answered the same items): then each window is a pair, and what makes
some windows hard for both cancels. Windows that follow one another come from one article and err alike, so an interval
is drawn from blocks of them. The divergence from the float model comes first: it varies less from text to text than
the loss does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsiq.errors import InputError
from lsiq.results.find import find_run
from lsiq.results.record import Record

RESAMPLES = 10_000
# Fewer pairs say nothing about their own spread.
FEWEST = 8
WINDOWS, ITEMS = "windows.parquet", "items.parquet"
# Windows that are drawn together, so that an article seldom reaches from one block into another.
BLOCK = 32


@dataclass(frozen=True)
class Difference:
    """A mean difference B - A of pairs, and its bootstrap interval.

    Attributes:
        key: what was measured.
        mean: of the differences.
        low, high: the interval.
        pairs: how many there are.
        blocks: of consecutive pairs, as which they are drawn again for the interval.
        lower_is_better: of the measure.
    """

    key: str
    mean: float
    low: float
    high: float
    pairs: int
    lower_is_better: bool
    blocks: int = 0

    @property
    def verdict(self) -> str:
        """Which run is better, if the interval leaves zero out."""
        if self.low <= 0 <= self.high:
            return "not told apart"
        return "B is better" if (self.mean < 0) == self.lower_is_better else "A is better"


def bootstrap_interval(
    differences: NDArray[np.float64], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return an interval for the mean of `differences (pairs,)` at the given level.

    Pairs are drawn again with replacement, and the mean of each draw is taken relative to its own standard error.

    Source: the bootstrap-t interval; Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 12.5.
    """
    count, mean = len(differences), float(differences.mean())
    error = differences.std(ddof=1) / np.sqrt(count)
    if error == 0:
        return mean, mean
    draw = np.random.default_rng(seed)
    ratios = []
    for _ in range(0, resamples, 500):  # bounds the memory for tasks of ten thousand items
        samples = differences[draw.integers(0, count, (500, count))]
        errors = samples.std(1, ddof=1) / np.sqrt(count)
        # A draw of equal pairs has no error of its own; it takes the sample's.
        ratios.append((samples.mean(1) - mean) / np.where(errors > 0, errors, error))
    low, high = np.quantile(np.concatenate(ratios), [(1 + level) / 2, (1 - level) / 2])
    return mean - float(low) * error, mean - float(high) * error


def block_means(differences: NDArray[np.float64], block: int) -> NDArray[np.float64]:
    """Return the means of blocks of `block` consecutive pairs or a few more; of fewer where too few blocks would be.

    Source: the block bootstrap for dependent data; Künsch, Annals of Statistics 17 (1989), with blocks that do not
    overlap.
    """
    count = max(len(differences) // block, min(FEWEST, len(differences)))
    return np.array([part.mean() for part in np.array_split(differences, count)])


def compare(a: Path, b: Path, level: float = 0.95) -> list[Difference]:
    """Return the differences B - A of two runs in everything both measured.

    Raises:
        InputError: a run is missing or unfinished, nothing was measured by both, or not on the same tokens and items.
    """
    first, second = (find_run(folder.parent, str(folder), state="finished")[0] for folder in (a, b))
    differences = [*_windows(a, b, first, second, level), *_items(a, b, first, second, level)]
    if not differences:
        raise InputError(f"{first.run_id} and {second.run_id} measured nothing in common; evaluate both on one corpus")
    return differences


def window_means(folder: Path, record: Record) -> dict[str, list[float]]:
    """Return the means of blocks of a run's windows by measure, such as `kl/wikitext2@512`; none if they are not there.

    Two runs on equal windows differ by the differences of these means (`compare_means`), so they are all that a paired
    test needs.
    """
    if not (folder / WINDOWS).is_file():
        return {}
    rows = _rows(folder / WINDOWS)
    measures = (measure for key in record.protocol for measure in _measures(key, record))
    return {
        f"{column}/{corpus}": [float(f"{mean:.6g}") for mean in block_means(values, BLOCK)]
        for column, corpus in measures
        if len(values := _column(rows, corpus, column)) >= FEWEST
    }


def compare_means(key: str, a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Difference:
    """Return the difference B - A of two runs in a measure that is better lower, by the means of equal blocks.

    Raises:
        InputError: the runs have not equally many blocks.
    """
    if len(a) != len(b):
        raise InputError(f"{key}: {len(a)} and {len(b)} blocks of windows; only equal windows compare")
    return _difference(key, [np.asarray(means, np.float64) for means in (a, b)], level, lower_is_better=True)


def _measures(key: str, *records: Record) -> Iterator[tuple[str, str]]:
    """Columns of the windows that the records have for a key of their protocols, each with its corpus."""
    if key.startswith("ppl/") and all(key in record.protocol for record in records):
        corpus = key.removeprefix("ppl/")
        if all(f"kl/{corpus}" in record.metrics for record in records):  # not with eval.divergence=false
            yield "kl", corpus
        yield "loss", corpus


def _windows(a: Path, b: Path, first: Record, second: Record, level: float) -> Iterator[Difference]:
    measures = [(key, *measure) for key in first.protocol for measure in _measures(key, first, second)]
    files = [_rows(folder / WINDOWS) for folder in (a, b)] if measures else []
    for key, column, corpus in measures:
        _check_same(first, second, key, ("tokens", "windows", "dtype"))
        values = [_column(rows, corpus, column) for rows in files]
        yield _difference(f"{column}/{corpus}", values, level, lower_is_better=True, block=BLOCK)


def _items(a: Path, b: Path, first: Record, second: Record, level: float) -> Iterator[Difference]:
    keys = [key for key in first.protocol if key.split("/")[0] in ("acc", "acc_norm") and key in second.protocol]
    files = [_rows(folder / ITEMS) for folder in (a, b)] if keys else []
    for key in keys:
        _check_same(first, second, key, ("items", "requests", "task_version", "lm_eval"))
        values = [_column(rows, key, "value") for rows in files]
        yield _difference(key, values, level, lower_is_better=False)


def _check_same(first: Record, second: Record, key: str, names: tuple[str, ...]) -> None:
    for name in names:
        value, other_value = first.protocol[key].get(name), second.protocol[key].get(name)
        if value != other_value:
            raise InputError(
                f"{key}: {first.run_id} was measured with {name}={value}, {second.run_id} with {name}={other_value}; "
                "only equal protocols compare: evaluate both alike"
            )


def _rows(file: Path) -> Any:
    """Return a run's file of windows or items as a table of pandas."""
    import pandas

    try:
        return pandas.read_parquet(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error}); run it again with force=true") from error


def _column(rows: Any, key: str, column: str) -> NDArray[np.float64]:
    return np.asarray(rows.loc[rows["key"] == key, column], np.float64)


def _difference(
    key: str, values: list[NDArray[np.float64]], level: float, lower_is_better: bool, block: int = 1
) -> Difference:
    a, b = values
    if len(a) != len(b) or len(a) < FEWEST:
        raise InputError(f"{key}: {len(a)} and {len(b)} pairs; equally many are needed, and at least {FEWEST}")
    differences = b - a
    samples = block_means(differences, block)
    interval = bootstrap_interval(samples, level)
    return Difference(key, float(differences.mean()), *interval, len(a), lower_is_better, len(samples))
