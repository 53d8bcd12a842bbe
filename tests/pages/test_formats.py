"""The tables of 4-bit floating-point formats: what their cells are made of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lsiq.errors import InputError
from lsiq.report.compact import Run, read_runs
from lsiq.tables.papers.formats import METHODS, PLAIN, SLOWER, FormatRuns, by_format, load_format_runs, row
from lsiq.tables.papers.size_runs import reports
from lsiq.tables.protocol import ROOT


@pytest.fixture(scope="module")
def records() -> list[Run]:
    return list(read_runs(ROOT / "analysis" / "records" / "formats.jsonl"))


@pytest.fixture(scope="module")
def runs() -> FormatRuns:
    return load_format_runs()


def test_a_share_is_a_runs_excess_over_that_of_rounding_on_the_same_text(records: list[Run], runs: FormatRuns) -> None:
    of_pair = [run for run in records if reports(run) and (run.model, run.setting) == ("tiny-llama", "mxfp4")]
    (rtn,) = (run for run in of_pair if run.method == "rtn")
    lsi = [run for run in of_pair if run.method == "lsi"]
    for text in ("file", "wikitext2"):
        key = f"excess/{text}@512"
        sample = runs.share("tiny-llama", "mxfp4", "lsi", text)
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
