"""The tables of 4-bit floating-point formats: what their cells are made of."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.configuration import CONF

from lsiq.errors import InputError
from lsiq.report.compact import Run, read_runs
from lsiq.tables.papers.formats import METHODS, MODELS, PLAIN, SLOWER, FormatRuns, by_format, load_format_runs, row
from lsiq.tables.papers.formats_published import COLUMNS, OTHERS, beside, load_records, losses
from lsiq.tables.papers.size_runs import reports
from lsiq.tables.protocol import ROOT
from lsiq.tables.published import Literature
from lsiq.tables.table import Table


@pytest.fixture(scope="module")
def records() -> list[Run]:
    return list(read_runs(ROOT / "analysis" / "records" / "formats.jsonl"))


@pytest.fixture(scope="module")
def runs() -> FormatRuns:
    return load_format_runs()


@pytest.fixture(scope="module")
def literature() -> Literature:
    return Literature(ROOT / "analysis" / "published")


def shown(table: Table, column: str, *labels: str) -> str | None:
    """The text of a column in the one row whose first labels begin so."""
    (row,) = (row for row in table.rows if all(map(str.startswith, row.labels, labels)))
    return row.cells[table.heads.index(column) - len(row.labels)].text


def test_a_share_is_a_runs_excess_over_that_of_rounding_on_the_same_text(records: list[Run], runs: FormatRuns) -> None:
    of_pair = [run for run in records if reports(run) and (run.model, run.setting) == ("tiny-llama", "mxfp4")]
    (rtn,) = (run for run in of_pair if run.method == "rtn")
    lsi = [run for run in of_pair if run.method == "lsi"]
    for text, measure in itertools.product(("file", "wikitext2"), ("excess", "kl")):
        key = f"{measure}/{text}@512"
        sample = runs.share("tiny-llama", "mxfp4", "lsi", text, measure)
        assert sample is not None
        assert sorted(sample.values) == pytest.approx(sorted(run.metrics[key] / rtn.metrics[key] for run in lsi))


def test_every_run_on_the_two_texts_stands_in_a_row(records: list[Run], runs: FormatRuns) -> None:
    shown = {line.labels[0] for line in by_format(runs, "file").rows}
    assert shown == {"rtn, excess in nats", *METHODS}
    assert {row(run) for run in records if reports(run)} == {"rtn", *METHODS}


def test_best_without_rotation_stands_as_best_in_narrow_blocks_alone(records: list[Run]) -> None:
    best = [run for run in records if reports(run) and run.method == "best"]
    assert {(run.setting, row(run)) for run in best} == {("nvfp4", "best"), ("mxfp4", "best"), ("mxfp4", PLAIN)}
    assert {run.get("method.start.label") for run in best if row(run) == PLAIN} == {"best-blocks"}
    assert {row(run) for run in records if run.method == "best-unrotated"} == {SLOWER}
    rotated = [run for run in records if not reports(run) and run.method == "best"]  # which start from a rotated run
    assert rotated
    assert {row(run) for run in rotated} == {"best"}


def test_runs_on_other_tokens_make_no_table(records: list[Run]) -> None:
    run = next(run for run in records if reports(run) and run.method == "lsi")
    other = replace(run, seed=7, tokens={**run.tokens, "ppl/wikitext2@512": "other"})
    with pytest.raises(InputError, match="measured on different tokens"):
        FormatRuns([*records, other])


# As published


def test_a_published_share_is_a_loss_over_that_of_rounding(literature: Literature, runs: FormatRuns) -> None:
    table = beside(literature, runs, "mxfp4")
    model, place = "llama-3.1-8b-instruct", "egiazarian2026mrgptq, table 1"
    assert shown(table, "rotated in blocks, gptq", model, place) == f"{(78.93 - 73.65) / (78.93 - 69.32):.2f}"
    of_c4 = math.log(19.37 / 16.63) / math.log(20.62 / 16.63)
    assert shown(table, "gptq", "qwen3-4b", "angelslim-focus", "C4") == f"{of_c4:.2f}"
    marked = f"{(70.75 - 67.58) / (70.75 - 65.50):.2f}‡"
    assert shown(table, "rounding learned", "qwen2.5-7b-instruct") == marked
    assert shown(table, "others", model, place) == "QuaRot 1.67; SpinQuant 0.99"


def test_ours_stand_below_the_published_ones(literature: Literature, runs: FormatRuns) -> None:
    table = beside(literature, runs, "nvfp4")
    assert [row.labels[:3] for row in table.rows[-8:]] == [
        (model, "here", text) for model in MODELS for text in ("C4", "WikiText-2")
    ]
    share = runs.share("tiny-llama", "nvfp4", "rotate+gptq", "file")
    assert share is not None
    assert shown(table, "rotated in blocks, gptq", "tiny-llama", "here", "C4") == f"{share.mean:.2f}"
    weights = [row.labels for row in table.rows if row.labels[3] == "weights"]
    assert {labels[1].partition(",")[0] for labels in weights} == {"egiazarian2026mrgptq", "torchao"}


def test_small_losses_of_accuracy_make_no_shares(literature: Literature, runs: FormatRuns) -> None:
    small = [line for line in literature.formats if line["model"] == "qwen3-8b" and line["setting"] == "nvfp4"]
    assert {line["method"]: line["value"] for line in small}["rtn"] == "76.61"  # of 77.49
    assert not any(row.labels[0] == "qwen3-8b" for row in beside(literature, runs, "nvfp4").rows)
    assert any(row.labels[0] == "qwen3-8b" for row in beside(literature, runs, "mxfp4").rows)


def test_losses_of_formats_are_those_of_rounding(literature: Literature) -> None:
    table = losses(literature, load_records())
    assert shown(table, "nvfp4", "llama-3.1-8b-instruct") == "4.2"
    assert shown(table, "w4a16-mxfp4", "llama-3.1-8b-instruct") == "3.49"
    assert shown(table, "mxfp8", "llama-3.1-8b", "torchao") == f"{math.log(7.6091 / 7.5472):.3g}"
    assert shown(table, "mxfp4", "tiny-opt", "here") == "1.49"
    assert all(sum(cell.text != "–" for cell in row.cells) >= 3 for row in table.rows)


def test_every_published_number_can_be_shown(literature: Literature) -> None:
    measured = Counter(
        tuple(line[key] for key in ("source", "place", "model", "setting", "metric", "method"))
        for line in literature.formats
    )
    assert set(measured.values()) == {1}
    named = {"rtn", *OTHERS, *(name for names in COLUMNS.values() for name in names)}
    assert {line["method"] for line in literature.formats} <= named
    settings = {file.stem for file in Path(CONF / "quant").glob("*.yaml")}
    assert {line["setting"] for line in literature.formats} <= settings
    for key in measured:
        assert measured[(*key[:-1], "rtn")] == 1, key
    for line in literature.formats:
        assert line["metric"].startswith(("acc/", "ppl/"))
        assert float(line["value"]) > 0
        assert float(line["float"]) > 0
