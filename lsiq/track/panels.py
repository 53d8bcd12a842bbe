"""What a tracker shows besides single numbers, and which blocks and linears get panels of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Cell: TypeAlias = str | float | int | None


@dataclass(frozen=True)
class Lines:
    """A family of lines over one axis.

    Attributes:
        name: of the panel, `section/title`.
        axis: what `x` counts.
        lines: by its name, what each line is at each `x`; None where it has no value.
    """

    name: str
    axis: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Histograms:
    """Counts between common edges before and after the run, one more edge than counts."""

    name: str
    edges: Sequence[float]
    before: Sequence[float]
    after: Sequence[float]


@dataclass(frozen=True)
class Table:
    """Rows under named columns; cells are text, numbers or None."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


Panel: TypeAlias = Lines | Histograms | Table


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` of the indices below `count`: the first, the last, and evenly spread ones between."""
    if most >= count:
        return list(range(count))
    if most < 2:
        return list(range(most))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def markdown(table: Table) -> str:
    """Return a table as Markdown shows it."""
    lines = [list(table.columns), *([cell_text(cell).replace("|", "\\|") for cell in row] for row in table.rows)]
    marks = ["---:" if right else "---" for right in right_aligned(table)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], marks, *lines[1:]))


def right_aligned(table: Table) -> list[bool]:
    """Say of each column whether it holds numbers."""
    return [any(isinstance(row[place], (int, float)) for row in table.rows) for place in range(len(table.columns))]


def cell_text(cell: Cell) -> str:
    """Return a cell as text; numbers with five digits."""
    if cell is None:
        return "—"
    return f"{cell:.5g}" if isinstance(cell, float) else str(cell)
