"""Published numbers, with the place they stand in and how far to trust them."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# How a number is marked; see analysis/published/README.md for what the words mean.
MARKS = {"first-hand": "", "second-hand": "†", "inferred": "‡"}
# Papers call some things otherwise.
ALIASES = {"rotate": "quarot-rtn", "rtn@mxint": "mxint-plain"}
# Where several papers print a number that each of them calls first-hand: OmniQuant's tables hold the baselines that
# the others quote, LQER's and QERA's their own family.
_FIRST = ("shao2024omniquant", "zhang2024lqer", "zhang2025qera")


@dataclass(frozen=True)
class Published:
    """A number as it was printed."""

    text: str
    trust: str
    source: str
    rank: int | None = None

    @property
    def marked(self) -> str:
        return self.text + MARKS[self.trust]


class Literature:
    """The tables of analysis/published, with the later additions in its folder more/."""

    def __init__(self, folder: Path) -> None:
        self.perplexities = _rows(folder, "perplexity.csv")
        self._perplexities: dict[tuple[str, ...], list[dict[str, str]]] = {}
        for row in self.perplexities:
            key = (row["model"], row["setting"], row["method"], row["dataset"], row["seqlen"])
            self._perplexities.setdefault(key, []).append(row)
        self.accuracies = _rows(folder, "zero_shot.csv")
        self.areas = _rows(folder, "hardware_area.csv")
        self.costs = _rows(folder, "cost.csv")
        self.formats = _rows(folder, "formats.csv")

    def perplexity(
        self, model: str, setting: str, method: str, dataset: str, seqlen: int = 2048, rank: int | None = None
    ) -> Published | None:
        """Return the perplexity that stands in the most trustworthy place, or None.

        Args:
            rank: of a low-rank method; None takes the smallest that was printed.
        """
        name = ALIASES.get(f"{method}@mxint" if setting.endswith("-mxint") else method, method)
        rows = [
            row
            for row in self._perplexities.get((model, setting, name, dataset, str(seqlen)), ())
            if rank is None or row["rank"] == str(rank)
        ]
        return _best(rows, "value")

    def accuracy(self, model: str, setting: str, method: str, task: str, metric: str = "acc") -> Published | None:
        """Return the accuracy in percent that stands in the most trustworthy place, or None."""
        key = (model, setting, method, task, metric)
        rows = [r for r in self.accuracies if (r["model"], r["setting"], r["method"], r["task"], r["metric"]) == key]
        return _best(rows, "value")

    def methods(self, settings: Iterable[str], dataset: str) -> list[str]:
        """Methods with a perplexity in one of the settings, in the order of the file."""
        names = set(settings)
        methods = [r["method"] for r in self.perplexities if r["setting"] in names and r["dataset"] == dataset]
        return list(dict.fromkeys(methods))


def _rows(folder: Path, name: str) -> list[dict[str, str]]:
    rows = []
    for file in (folder / name, folder / "more" / name):
        if file.exists():
            with file.open(encoding="utf-8", newline="") as lines:
                rows += [_named_as_here(row) for row in csv.DictReader(lines)]
    return rows


def _named_as_here(row: dict[str, str]) -> dict[str, str]:
    """Return the row under the name that the method has here: the paper's LSI trains a corner."""
    return {**row, "method": "lsi-corner"} if row.get("method") == "lsi" else row


def _best(rows: list[dict[str, str]], column: str) -> Published | None:
    printed = [row for row in rows if row[column] not in ("", "nan")]
    if not printed:
        return None

    def order(row: dict[str, str]) -> tuple[int, int, int]:
        source = _FIRST.index(row["source"]) if row["source"] in _FIRST else len(_FIRST)
        return list(MARKS).index(row["trust"]), source, int(row.get("rank") or 0)

    row = min(printed, key=order)
    return Published(row[column], row["trust"], row["source"], int(row["rank"]) if row.get("rank") else None)
