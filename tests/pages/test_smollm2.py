"""The table of SmolLM2 by the published protocol: what its cells are made of."""

from __future__ import annotations

import math
import statistics

import pytest

from lsiq.report.compact import Run, read_runs
from lsiq.tables.papers.size_runs import PACKAGE
from lsiq.tables.papers.smollm2 import (
    ACCURACY,
    ACTIVATIONS,
    METHODS,
    MODEL,
    WEIGHTS,
    ProtocolRuns,
    by_setting,
    load_protocol_runs,
)
from lsiq.tables.protocol import ROOT
from lsiq.tables.study import LQER_TASKS


@pytest.fixture(scope="module")
def records() -> list[Run]:
    return list(read_runs(ROOT / "analysis" / "records" / "smollm2.jsonl"))


@pytest.fixture(scope="module")
def runs() -> ProtocolRuns:
    return load_protocol_runs()


def test_a_cell_has_what_the_record_of_its_setting_and_method_says(records: list[Run], runs: ProtocolRuns) -> None:
    lsi = [run for run in records if (run.setting, run.method) == ("w3a16g64", "lsi")]
    assert sorted(run.seed for run in lsi) == [0, 1, 2]
    for metric in ("excess/wikitext2@2048", "kl/file@2048"):
        sample = runs.sample("w3a16g64", "lsi", metric)
        assert sample is not None
        assert sorted(sample.values) == sorted(run.metrics[metric] for run in lsi)
    accuracy = runs.sample("w3a16g64", "lsi", ACCURACY)
    assert accuracy is not None
    assert accuracy.mean == pytest.approx(
        statistics.fmean(run.metrics[f"acc/{task}"] for run in lsi for task in LQER_TASKS)
    )


def test_the_package_is_measured_against_the_float_model_of_the_other_runs(
    records: list[Run], runs: ProtocolRuns
) -> None:
    (package,) = (run for run in records if run.model == "ar-w2-200")
    (rtn,) = (run for run in records if (run.setting, run.method) == ("w2a16g64", "rtn"))
    key = "float/ppl/wikitext2@2048"
    sample = runs.sample("w2a16g64", PACKAGE, "excess/wikitext2@2048")
    assert sample is not None
    assert sample.mean == pytest.approx(math.log(package.metrics[key] / rtn.metrics[key]))
    assert runs.sample("w2a16g64", PACKAGE, "kl/file@2048") is None


def test_every_run_stands_in_a_table_and_all_read_the_same_tokens(records: list[Run], runs: ProtocolRuns) -> None:
    tables = [by_setting(runs, name, settings) for name, settings in (("a", WEIGHTS), ("b", ACTIVATIONS))]
    shown = [row.labels for table in tables for row in table.rows if row.labels[1]]
    assert len(shown) == len({(run.model, run.setting, run.method) for run in records})
    assert {run.method for run in records if run.model == MODEL} <= set(METHODS)
    for key in ("ppl/wikitext2@2048", "ppl/file@2048"):
        assert len({run.tokens[key] for run in records}) == 1


def test_the_accuracys_standard_error_is_what_the_page_says(records: list[Run]) -> None:
    for run in records:
        if run.model == MODEL:
            variances = [run.metrics[f"acc_stderr/{task}"] ** 2 for task in LQER_TASKS]
            assert 0.0045 < math.sqrt(sum(variances)) / len(LQER_TASKS) < 0.0075
