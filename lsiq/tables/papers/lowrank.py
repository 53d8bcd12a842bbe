"""The tables of the low-rank family: LQER's W4A8 and W2, ranks, bits and circuit area."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lsiq.tables.papers.ablations import axis_table
from lsiq.tables.papers.layout import BUNDLED
from lsiq.tables.protocol import PAPERS, STUDY
from lsiq.tables.published import Literature
from lsiq.tables.study import Runs, Sample
from lsiq.tables.table import Cell, Row, Table, decimals

FAMILY = ("lqer", "l2qer", "qera-approx", "qera-exact")
# The layer that LQER's table of areas is about: its shape (out, in), and the rank beside it.
AREA_SHAPE, AREA_RANK = (11008, 4096), 32


def two_bits(runs: Runs, literature: Literature) -> Table:
    """Return L2QER's perplexities at 2 bits by model and rank, ours beside the published."""
    models, ranks = ("opt-125m", "opt-1.3b", "opt-2.7b", "opt-6.7b", "opt-13b", "opt-30b"), (32, 64, 128, 256, 512)
    models += ("llama-7b", "llama-13b")
    at_rank = replace(PAPERS, varied=("method.rank",))
    rows = []
    for rank in ranks:
        cells = tuple(
            Cell(
                runs.sample(at_rank, model, "w2a8-mxint", "l2qer", "ppl/wikitext2@2048", {"method.rank": rank}),
                literature.perplexity(model, "w2a8-mxint", "l2qer", "wikitext2", rank=rank),
                wanted=True,
            )
            for model in models
        )
        rows.append(Row((str(rank),), cells, str(rank)))
    missing = [
        str(rank) for rank, row in zip(ranks, rows, strict=True) if any(cell.sample is None for cell in row.cells)
    ]
    commands = [
        f"{PAPERS.command} model={','.join(models)} quant=w2a8-mxint method=l2qer method.rank={','.join(missing)} "
        f"{PAPERS.after}"
    ]
    caption = "L²QER with 2-bit weights (w2a8-mxint) on WikiText-2, by rank: ours / published"
    heads = ("rank", *models)
    return Table("lqer-w2", caption, heads, tuple(rows), True, commands=commands if missing else (), folded=True)


def ranks(runs: Runs) -> Table:
    """Return the excess of each scale by rank, on a bundled model with 2-bit weights."""
    return axis_table(
        runs,
        "lqer-ranks",
        "Excess loss by rank, tiny-llama, w2a8-mxint",
        "method.rank",
        (16, 32, 64, 128, 256),
        [(method, "w2a8-mxint") for method in FAMILY],
        bits=True,
    )


def published_ranks(literature: Literature) -> Table:
    """Return LQER's own sweep of ranks."""
    rows = [
        row
        for row in literature.perplexities
        if (row["model"], row["setting"], row["method"]) == ("opt-1.3b", "w3a8-mxint-b32-seq128", "lqer")
    ]
    values = tuple(
        literature.perplexity("opt-1.3b", "w3a8-mxint-b32-seq128", "lqer", "wikitext2", rank=int(row["rank"]))
        for row in rows
    )
    return Table(
        "lqer-ranks-published",
        "The published sweep of ranks: LQER, opt-1.3b, WikiText-2, 3-bit weights in blocks of 32, 128 sequences",
        ("rank", *(row["rank"] for row in rows)),
        (Row(("perplexity",), tuple(Cell(text=value.marked if value else "") for value in values)),),
    )


def costs(runs: Runs, settings: Sequence[tuple[str, str]]) -> Table:
    """Return what each setting and method costs: bits and multiply-accumulates as recorded, area as estimated."""
    rows = []
    for setting, method in settings:
        cells: list[Cell] = []
        for model in BUNDLED:
            bits = runs.mean(STUDY, model, setting, method, lambda run: run.average_bits)
            area = runs.mean(STUDY, model, setting, method, lambda run: run.relative_area)
            cells += [_number(bits), _number(area)]
        rows.append(Row((setting, method), tuple(cells)))
    heads = ("setting", "method", *(f"{model}, {unit}" for model in BUNDLED for unit in ("bits", "area")))
    missing = [
        (model, *row.labels)
        for row in rows
        for place, model in enumerate(BUNDLED)
        if row.cells[2 * place].sample is None
    ]
    caption = "Average bits per weight, and circuit area relative to float16 where it can be estimated"
    return Table("lqer-costs", caption, heads, tuple(rows), number=decimals(3), commands=STUDY.commands(missing))


def areas(literature: Literature) -> Table:
    """Return the circuit areas of LQER's table beside this project's estimate for the same layer."""
    from lsiq.pipeline.area import relative_area

    out, into = AREA_SHAPE
    branch = AREA_RANK * (out + into)
    macs = {
        "fp16": {"16x16": out * into},
        "w6a6": {"6x6": out * into},
        "w4a8-mxint": {"4x8": out * into, "8x8": branch},
        "w4a6-mxint": {"4x6": out * into, "8x6": branch},
    }
    rows = []
    for row in literature.areas:
        estimate = relative_area(macs[row["setting"]], out * into) if row["setting"] in macs else None
        mark = "" if row["trust"] == "first-hand" else "‡"
        cells = (Cell(text=DASHLESS if estimate is None else f"{estimate:.3f}"), Cell(text=row["relative_area"] + mark))
        rows.append(Row((row["setting"], row["method"]), cells))
    caption = "Circuit area of one layer (4096 to 11008, rank 32) relative to float16"
    return Table("lqer-area", caption, ("setting", "method", "estimated", "published"), tuple(rows))


DASHLESS = "not estimated"


def _number(value: float | None) -> Cell:
    return Cell(None if value is None else Sample((value,), exact=True), wanted=True)
