"""Published numbers that nothing of ours can stand beside, as they were printed."""

from __future__ import annotations

from collections.abc import Sequence

from lsiq.tables.published import MARKS, Literature
from lsiq.tables.table import Cell, Row, Table


def other_means(literature: Literature) -> Table:
    """Return the means over tasks whose sets are not LQER's: OmniQuant's, which is not recorded, QERA's and GSQ's."""
    rows = [row for row in literature.accuracies if row["task"] in ("mean5", "mean6") and row["metric"] != "acc"]
    columns = ("source", "task", "metric", "model", "setting", "method")
    return _listing(
        "zero-shot-other-means", "Published means over other sets of tasks, percent", rows, columns, "value"
    )


def costs(literature: Literature) -> Table:
    """Return how long the published methods take."""
    rows = [row for row in literature.costs if row["hours"]]
    columns = ("source", "method", "model", "setting", "hardware")
    return _listing("published-costs", "Published times of calibration, hours", rows, columns, "hours")


def _listing(name: str, caption: str, rows: Sequence[dict[str, str]], columns: tuple[str, ...], value: str) -> Table:
    table_rows = (
        Row(tuple(row[column] for column in columns), (Cell(text=row[value] + MARKS[row["trust"]]),)) for row in rows
    )
    return Table(name, caption, (*columns, value), tuple(table_rows), folded=True)
