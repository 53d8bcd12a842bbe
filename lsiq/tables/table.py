"""Tables of measured and published numbers, as Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from lsiq.tables.published import Published
from lsiq.tables.study import Sample

DASH = "–"
# Rows with more bits than this share above the fewest of their setting are another trade, and do not compete.
EQUAL_BITS = 1.02
SIGNIFICANCE = 0.05
BOLD = (
    "Bold: best of its column and setting, and told apart from every other row there with as many bits (within "
    f"{EQUAL_BITS - 1:.0%}) and as much text by Welch's t-test over seeds (two-sided, p < {SIGNIFICANCE}). Numbers "
    "that do not depend on the seed count as constants; beside a single run nothing is bold."
).replace("%", " %")


def decimals(digits: int) -> Callable[[float], str]:
    """Return a way to write numbers: with so many decimals, fewer where they are large."""

    def write(value: float) -> str:
        if abs(value) >= 1e5:
            return f"{value:.1e}"
        text = f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.0f}"
        return text if float(text) else text.removeprefix("-")  # no minus before a zero

    return write


PERPLEXITY = decimals(2)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


@dataclass(frozen=True)
class Cell:
    """One place of a table.

    Attributes:
        sample: what this project measured.
        published: what a paper printed.
        wanted: whether a command exists that measures it.
        bold: whether it is the best, and told apart from the others.
        text: words in place of numbers.
    """

    sample: Sample | None = None
    published: Published | None = None
    wanted: bool = False
    bold: bool = False
    text: str | None = None

    def write(self, number: Callable[[float], str], beside: bool, tex: bool = False, counted: bool = False) -> str:
        """Return the cell's text; `beside` puts the published number behind ours, empty ones included.

        Args:
            counted: whether a number that depends on the seed says of how many runs it is.
        """
        if self.text is not None:
            return self.text
        measured = DASH if self.wanted else ""
        if self.sample is not None:
            plus = r" $\pm$ " if tex else " ± "
            measured = number(self.sample.mean)
            if not self.sample.exact:
                spread = self.sample.spread
                measured += "" if spread is None else plus + number(spread)
                if counted:
                    measured += f" ({len(self.sample.values)})"
                elif spread is None:
                    measured += " (1 seed)"
            if self.bold:
                measured = rf"\textbf{{{measured}}}" if tex else f"**{measured}**"
        if not beside:
            return measured
        published = DASH if self.published is None else self.published.marked
        return f"{measured or '·'} / {published}" if measured or self.published else ""


@dataclass(frozen=True)
class Row:
    """Labels, then cells; `group` says which rows compete for bold, `number` how to write them if not as all others."""

    labels: tuple[str, ...]
    cells: tuple[Cell, ...]
    group: str = ""
    competes: bool = True
    number: Callable[[float], str] | None = None

    def write(self, table: Table, tex: bool = False) -> list[str]:
        """Return the texts of the cells."""
        number = self.number or table.number
        return [cell.write(number, table.beside, tex, table.counted) for cell in self.cells]


@dataclass(frozen=True)
class Table:
    """Rows under headings; shows itself in a notebook as Markdown, with LaTeX beside.

    Attributes:
        name: of its files.
        heads: of the labels, then of the cells.
        beside: whether each cell has ours and, behind a stroke, the published number.
        commands: what fills the empty cells.
        folded: whether a page shows it only when asked.
        counted: whether cells say of how many runs they are.
    """

    name: str
    caption: str
    heads: tuple[str, ...]
    rows: tuple[Row, ...]
    beside: bool = False
    number: Callable[[float], str] = PERPLEXITY
    commands: Sequence[str] = ()
    folded: bool = False
    counted: bool = False

    def markdown(self) -> str:
        """Return the table with its caption, and a list of commands where cells are empty."""
        labels = len(self.rows[0].labels) if self.rows else 1
        lines = [_line(self.heads), _line(["---"] * labels + ["---:"] * (len(self.heads) - labels))]
        lines += [_line([*row.labels, *row.write(self)]) for row in self.rows]
        parts = [f"**{self.caption}**", "\n".join(lines), *self.notes]
        if self.folded:
            parts = [f"<details><summary>{self.caption}</summary>", *parts[1:], "</details>"]
        if self.commands:
            listed = "\n".join(self.commands)
            parts.append(
                f"<details><summary>Cells without a number of ours ({DASH}): {self.empty}; commands that fill them: "
                f"{len(self.commands)}</summary>\n\n```sh\n{listed}\n```\n\n</details>"
            )
        return "\n\n".join(parts) + "\n"

    @property
    def notes(self) -> list[str]:
        """What must be said beside the numbers, once each."""
        cells = [cell for row in self.rows for cell in row.cells if cell.sample is not None]
        notes = dict.fromkeys(note for cell in cells if cell.sample for note in cell.sample.notes)
        return [*notes, *[BOLD] * any(cell.bold for cell in cells)]

    def latex(self) -> str:
        """Return the table as a booktabs environment."""
        columns = len(self.heads)
        labels = len(self.rows[0].labels) if self.rows else 1
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_tex(self.caption)}}}"]
        lines += [rf"\begin{{tabular}}{{{'l' * labels}{'r' * (columns - labels)}}}", r"\toprule"]
        lines += [" & ".join(_tex(head) for head in self.heads) + r" \\", r"\midrule"]
        for row in self.rows:
            cells = (_marks(cell) for cell in row.write(self, tex=True))
            lines.append(" & ".join([*(_tex(label) for label in row.labels), *cells]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", *(rf"\par {_tex(note)}" for note in self.notes), r"\end{table}"]
        return "\n".join(lines) + "\n"

    @property
    def empty(self) -> int:
        return sum(cell.wanted and cell.sample is None for row in self.rows for cell in row.cells)

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        return {"text/markdown": self.markdown(), "text/latex": self.latex()}, {"lsiq": {"name": self.name}}


def best_in_bold(rows: Sequence[Row], lower: bool = True) -> tuple[Row, ...]:
    """Return the rows with the best cell of each column and group in bold, where it is told apart from every other.

    Rows that do not compete (more bits or more text than the others) are left as they are.
    """
    marked = list(rows)
    for column in range(len(rows[0].cells) if rows else 0):
        for group in dict.fromkeys(row.group for row in rows):
            entries = [
                (index, sample)
                for index, row in enumerate(rows)
                if row.group == group and row.competes and (sample := row.cells[column].sample) is not None
            ]
            entries.sort(key=lambda entry: entry[1].mean, reverse=not lower)
            if len(entries) > 1 and all(told_apart(entries[0][1], other) for _, other in entries[1:]):
                best = entries[0][0]
                cells = list(marked[best].cells)
                cells[column] = replace(cells[column], bold=True)
                marked[best] = replace(marked[best], cells=tuple(cells))
    return tuple(marked)


def told_apart(one: Sample, other: Sample) -> bool:
    """Whether Welch's t-test, two-sided, tells the means of two samples apart; never if either is of a single run.

    What does not depend on the seed is a constant that the other sample is tested against.
    """
    if one.spread is None or other.spread is None:
        return False
    if one.spread == other.spread == 0:
        return one.mean != other.mean
    if one.exact:
        one, other = other, one
    if other.exact:
        test = stats.ttest_1samp(one.values, other.mean)
    else:
        test = stats.ttest_ind(one.values, other.values, equal_var=False)
    return bool(np.asarray(test)[1] < SIGNIFICANCE)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _tex(text: str) -> str:
    for plain, escaped in (("_", r"\_"), ("%", r"\%"), ("&", r"\&")):
        text = text.replace(plain, escaped)
    return _marks(text)


def _marks(text: str) -> str:
    for plain, escaped in (
        ("†", r"$^\dagger$"),
        ("‡", r"$^\ddagger$"),
        ("–", "--"),
        ("·", r"$\cdot$"),
        ("±", r"$\pm$"),
    ):
        text = text.replace(plain, escaped)
    return text
