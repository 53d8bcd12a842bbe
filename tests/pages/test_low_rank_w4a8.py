"""LQER's W4A8 by kind of number: which records stand in which row, and at what cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lsiq.errors import InputError
from lsiq.report.compact import Run, read_runs
from lsiq.tables.papers.lowrank_w4a8 import KINDS, SameBits, kind, load_same_bits, same_bits
from lsiq.tables.protocol import ROOT


@pytest.fixture(scope="module")
def records() -> list[Run]:
    return read_runs(ROOT / "analysis" / "records" / "w4a8.jsonl")


def test_every_record_stands_in_a_row_with_its_bits(records: list[Run]) -> None:
    assert {kind(run) for run in records} == KINDS.keys()
    shown = {row.labels: row.cells for row in same_bits(load_same_bits()).rows}
    assert shown.keys() == {(KINDS[kind(run)], run.method) for run in records}
    for run in records:
        if run.model == "tiny-llama":
            bits, area = (cell.text for cell in shown[KINDS[kind(run)], run.method][:2])
            assert bits == f"{run.average_bits:.2f}"
            assert area == ("–" if run.relative_area is None else f"{run.relative_area:.2f}")


def test_weights_of_the_first_three_kinds_take_the_same_bits(records: list[Run]) -> None:
    plain = {
        run.average_bits
        for run in records
        if run.method in ("rtn", "gptq") and not run.setting.startswith(("w6", "w8"))
    }
    assert plain == {4.25}


def test_a_cell_is_the_mean_over_seeds(records: list[Run]) -> None:
    found = [run for run in records if (run.model, run.setting, run.method) == ("tiny-llama", "mxfp4a8", "qera-exact")]
    cells = {row.labels: row.cells for row in same_bits(load_same_bits()).rows}["MXFP4, MXFP8", "qera-exact"]
    sample = cells[2].sample
    assert sample is not None
    assert sorted(sample.values) == sorted(run.metrics["excess/file@512"] for run in found)


def test_runs_on_other_tokens_make_no_table(records: list[Run]) -> None:
    other = replace(records[0], seed=7, tokens=dict.fromkeys(records[0].tokens, "other"))
    with pytest.raises(InputError, match="different tokens"):
        SameBits([*records, other])
