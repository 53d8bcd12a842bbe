"""What one method leaves of another's loss by size of model and by the tokens that it was trained on, apart."""

from __future__ import annotations

from collections.abc import Sequence

from lsiq.tables.papers.left_over import ratio, written
from lsiq.tables.papers.model_sizes import TEXTS
from lsiq.tables.papers.size_runs import SizeRuns
from lsiq.tables.table import DASH, Cell, Row, Table, decimals

RATIOS = (("lsi-diagonal", "omniquant"), ("lsi", "omniquant"), ("lsi", "gptq"), ("best", "autoround"))
# In nats: where rounding itself costs less, what methods leave of each other is chance.
NOISE = 0.01
# Of each part of the table the models, and what their rows are called.
PARTS = {
    "100 M tokens": {
        "3 M": "3 M",
        "11 M, 100 M tokens": "11 M",
        "11 M, 100 M tokens, other seed": "11 M, another seed",
        "30 M": "30 M",
        "90 M": "90 M",
        "300 M": "300 M",
    },
    "11 M": {
        "11 M, 40 M tokens": "40 M tokens",
        "11 M, 100 M tokens": "100 M tokens",
        "11 M": "420 M tokens, other text",
    },
}


def ratios(runs: SizeRuns, metric: str, widths: Sequence[str] = ("w2", "w3"), folded: bool = False) -> Table:
    """Return what rounding to nearest costs, and ratios of means: a row per width and model; `metric`: excess, kl.

    Where rounding costs less than `NOISE`, ratios are left out.
    """
    runs, rows = runs.of_one_training(), []
    for width in widths:
        for alike, models in PARTS.items():
            for size, name in models.items():
                cells = [cell for text in TEXTS for cell in _cells(runs, size, width, f"{metric}/{text}")]
                rows.append(Row((width, alike, name), tuple(cells)))
    words = {"excess": "Excess", "kl": "Divergence"}[metric]
    caption = f"{words} of rounding to nearest in nats, and what is left of one method's by another (ratio of means)"
    columns = ("rtn", *(" / ".join(pair) for pair in RATIOS))
    heads = ("setting", "held equal", "model", *(f"{column}, {TEXTS[text]}" for text in TEXTS for column in columns))
    return Table(f"trainings-{metric}", caption, heads, tuple(rows), number=decimals(3), folded=folded)


def _cells(runs: SizeRuns, size: str, width: str, metric: str) -> list[Cell]:
    rounding = runs.sample(size, width, "rtn", metric)
    cells = [Cell(text=DASH) if rounding is None else Cell(rounding)]
    told = rounding is not None and rounding.mean >= NOISE
    for method, other in RATIOS:
        cells.append(Cell(text=written(ratio(runs, size, width, method, (other,), metric)) if told else DASH))
    return cells
