"""Whether one method is better than another, seed by seed: paired tests from the windows of committed runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from lsiq.report.significance import Difference, compare_means
from lsiq.tables.papers.model_sizes import AGAIN_90M, AGAIN_300M, AGAIN_OPT, SIZES, TEXTS, THIRD_OPT, TRAININGS
from lsiq.tables.papers.size_runs import Point, SizeRuns
from lsiq.tables.table import DASH, Cell, Row, Table

# What this project says of its methods: each, and the one that it is compared with.
PAIRS = (
    ("lsi", "omniquant"),
    ("lsi", "gptq"),
    ("lsi", "awq"),
    ("lsi", "autoround"),
    ("lsi", "sde"),
    ("lsi-diagonal", "omniquant"),
    ("sde", "omniquant"),
    ("sde", "lsi-diagonal"),
    ("best", "autoround"),
    ("best", "lsi"),
    ("best", "gptq"),
)
WEIGHTS, ACTIVATIONS = ("w2", "w3", "w4"), ("w4a8", "w4a4")
# The sizes of all tables, and what was trained once more for a comparison.
COMPARED = (*SIZES, *(size for size in TRAININGS if size.name in (AGAIN_OPT, THIRD_OPT, AGAIN_90M, AGAIN_300M)))
MEASURES = {"kl": "divergence", "loss": "loss"}
_WORDS = {"A is better": "better", "not told apart": "level", "B is better": "worse"}


@dataclass(frozen=True)
class Comparison:
    """Paired tests of a method against another, one for each seed that both were run with.

    Attributes:
        differences: of the other from the method, so that a positive mean says that the method is better.
    """

    differences: tuple[Difference, ...]

    @property
    def verdicts(self) -> Counter[str]:
        """By verdict on the method (better, level, worse), in how many seeds it was that."""
        return Counter(_WORDS[difference.verdict] for difference in self.differences)

    def write(self) -> str:
        """Return the mean gain over the seeds and the verdicts, as a cell of the table."""
        gain = sum(difference.mean for difference in self.differences) / len(self.differences)
        verdicts = self.verdicts
        words = ", ".join(f"{word} {verdicts[word]}" for word in _WORDS.values() if verdicts[word])
        return f"{gain:+.4f} ({words})"


@cache  # three tables ask for the same
def comparison(sizes: SizeRuns, size: str, width: str, pair: tuple[str, str], key: str) -> Comparison | None:
    """Return the tests of a pair in a measure without its length, such as `kl/file`; None where no seed has both.

    Runs are paired that have their seed, their model and the type of its products in common.
    """
    method, other = (_by_seed(sizes.of(size, width, entry)) for entry in pair)
    found = [
        compare_means(measure, method[seed].window_means[measure], other[seed].window_means[measure])
        for seed in sorted(method.keys() & other.keys())
        for measure in method[seed].window_means.keys() & other[seed].window_means.keys()
        if measure.partition("@")[0] == key
    ]
    return Comparison(tuple(found)) if found else None


def paired(sizes: SizeRuns) -> Table:
    """Return a row for each size, setting and pair that windows are on record of, and a column for each measure."""
    columns = {f"{measure}/{text}": f"{MEASURES[measure]}, {TEXTS[text]}" for measure in MEASURES for text in TEXTS}
    rows = []
    for size in COMPARED:
        for setting in (*WEIGHTS, *ACTIVATIONS):
            for pair in PAIRS:
                cells = [comparison(sizes, size.name, setting, pair, key) for key in columns]
                if any(cells):
                    written = tuple(Cell(text=DASH if cell is None else cell.write()) for cell in cells)
                    rows.append(Row((size.name, setting, pair[0], pair[1]), written))
    caption = "What a method gains over another in nats, mean over seeds, and in how many seeds a paired test says so"
    return Table("paired", caption, ("size", "setting", "method", "than", *columns.values()), tuple(rows))


def paired_in_short(sizes: SizeRuns, settings: Sequence[str], name: str) -> Table:
    """Return how often the method of a pair is told to be better and worse, over settings, texts and seeds.

    A row has a pair and a measure, a column a size; the other comparisons are level.
    """
    found = {
        (pair, measure, size.name): sum(
            (
                test.verdicts
                for setting in settings
                for text in TEXTS
                if (test := comparison(sizes, size.name, setting, pair, f"{measure}/{text}")) is not None
            ),
            Counter(),
        )
        for pair in PAIRS
        for measure in MEASURES
        for size in COMPARED
    }
    columns = [size.name for size in COMPARED if any(key[2] == size.name and of for key, of in found.items())]
    rows = [
        Row((*pair, MEASURES[measure]), tuple(Cell(text=_in_short(found[pair, measure, size])) for size in columns))
        for pair in PAIRS
        for measure in MEASURES
        if any(found[pair, measure, size] for size in columns)
    ]
    caption = f"In how many comparisons the method is told to be better: {', '.join(settings)}, both texts, every seed"
    return Table(f"paired-{name}", caption, ("method", "than", "measure", *columns), tuple(rows))


def _in_short(verdicts: Counter[str]) -> str:
    if not verdicts.total():
        return DASH
    worse = f", {verdicts['worse']} worse" if verdicts["worse"] else ""
    return f"{verdicts['better']} of {verdicts.total()}{worse}"


def _by_seed(points: Sequence[Point]) -> dict[tuple[int | None, tuple[str, ...], str | None], Point]:
    return {(point.seed, point.model, point.dtype): point for point in points if point.window_means}
