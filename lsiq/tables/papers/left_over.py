"""What one method leaves of another's loss, by size of model: the ratios that claims of a lead rest on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from lsiq.tables.papers.model_sizes import AGAIN_300M, TEXTS
from lsiq.tables.papers.size_runs import PACKAGE, SizeRuns
from lsiq.tables.table import DASH, Cell, Row, Table

WIDTHS = ("w2", "w3", "w4")
# In nats: where rounding to nearest costs less, what methods leave of each other is chance.
NOISE = 0.005
# A method, and those of which the best counts.
PAIRS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("lsi", ("omniquant",)),
    ("lsi", ("gptq", "awq")),
    ("lsi", ("autoround",)),
    ("lsi-diagonal", ("omniquant",)),
    ("best", ("autoround",)),
    ("best", (PACKAGE,)),
)
# Where a pair was run on another training of a column's model, and on none of its own.
STANDS_IN = {("300 M", PACKAGE): AGAIN_300M}
HEAD = "method, of another's"
MOST = 2.0  # what is more is not written out: the other method loses next to nothing there
_CAPTIONS = {"excess": "Excess", "kl": "Divergence"}


def left_over(runs: SizeRuns, metric: str, folded: bool = False) -> Table:
    """Return what methods leave of others' `metric` (excess, kl): a row per setting and pair, both texts in a cell."""
    runs = runs.of_one_training()
    columns = [size.name for size in runs.sizes]
    rows = []
    for width in WIDTHS:
        for method, others in PAIRS:
            found = [
                [_left(runs, size, width, method, others, f"{metric}/{text}") for text in TEXTS] for size in columns
            ]
            texts = [[written(value) for value in values] for values in found]
            cells = tuple(Cell(text=DASH if set(both) == {DASH} else " / ".join(both)) for both in texts)
            if any(cell.text != DASH for cell in cells):
                rows.append(Row((width, _words(method, others)), cells))
    caption = f"{_CAPTIONS[metric]} that one method leaves of another's, {' / '.join(TEXTS.values())} (ratio of means)"
    return Table(f"left-over-{metric}", caption, ("setting", HEAD, *columns), tuple(rows), folded=folded)


def left_in_short(runs: SizeRuns) -> Table:
    """Return the least and the most of each pair's excess over settings and texts: a row per pair."""
    runs = runs.of_one_training()
    columns = [size.name for size in runs.sizes]
    rows = []
    for method, others in PAIRS:
        cells = []
        for size in columns:
            found = [_left(runs, size, width, method, others, f"excess/{text}") for width in WIDTHS for text in TEXTS]
            ends = [value for value in found if value is not None]
            cells.append(Cell(text=f"{written(min(ends))} to {written(max(ends))}" if ends else DASH))
        rows.append(Row((_words(method, others),), tuple(cells)))
    caption = "What is left, in short: excess, least to most over 2, 3 and 4 bits and both texts"
    return Table("left-over-excess-short", caption, (HEAD, *columns), tuple(rows))


def _left(runs: SizeRuns, size: str, width: str, method: str, others: Sequence[str], metric: str) -> float | None:
    """The ratio, but None where rounding to nearest itself costs less than `NOISE`."""
    rounding = runs.sample(size, width, "rtn", metric)
    if rounding is None or rounding.mean < NOISE:
        return None
    model = next((STANDS_IN[size, other] for other in others if (size, other) in STANDS_IN), size)
    return ratio(runs, model, width, method, others, metric)


def ratio(runs: SizeRuns, size: str, width: str, method: str, others: Sequence[str], metric: str) -> float | None:
    """Return the largest ratio of means over the models and seeds that a method has in common with each of the others.

    A package's checkpoint has no seed: it is compared with all runs. None where nothing is in common; infinite where
    another loses nothing.
    """
    ratios = []
    for other in others:
        of_method, of_other = (_by_run(runs, size, width, entry, metric) for entry in (method, other))
        if other != PACKAGE:
            common = of_method.keys() & of_other.keys()
            of_method, of_other = ({run: by_run[run] for run in common} for by_run in (of_method, of_other))
        if not of_method or not of_other:
            return None
        base = fmean(of_other.values())
        ratios.append(fmean(of_method.values()) / base if base > 0 else math.inf)
    return max(ratios)


def _by_run(runs: SizeRuns, size: str, width: str, entry: str, metric: str) -> dict[tuple[Any, ...], float]:
    """By model and seed; a package's checkpoint has neither."""
    return {
        (point.model, point.seed): value
        for point in runs.of(size, width, entry)
        for key, value in point.metrics.items()
        if key.partition("@")[0] == metric
    }


def _words(method: str, others: Sequence[str]) -> str:
    return f"{method}, of {others[0] if len(others) == 1 else 'the better of ' + ' and '.join(others)}"


def written(value: float | None) -> str:
    """Return a ratio as a cell has it."""
    if value is None:
        return DASH
    return f"{value:.2f}" if value <= MOST else f"above {MOST:g}"
