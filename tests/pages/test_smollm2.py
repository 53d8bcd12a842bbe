"""The table of SmolLM2 by the published protocol: what its cells are made of."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from lsiq.errors import InputError
from lsiq.report.compact import Run, read_runs
from lsiq.tables.papers.size_runs import PACKAGE
from lsiq.tables.papers.smollm2 import (
    ACCURACY,
    ACTIVATIONS,
    AGAIN,
    BEFORE,
    METHODS,
    MODEL,
    MORE_TEXT,
    MXINT,
    TODAY,
    VARIANTS,
    WEIGHTS,
    ProtocolRuns,
    by_setting,
    load_protocol_runs,
)
from lsiq.tables.study import LQER_TASKS


@pytest.fixture(scope="module")
def records() -> list[Run]:
    return list(read_runs(BEFORE))


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


def test_runs_on_tokens_of_two_kinds_make_no_table(records: list[Run]) -> None:
    run = next(run for run in records if (run.setting, run.method) == ("w3a16g64", "lsi"))
    other = replace(run, seed=7, tokens={**run.tokens, "ppl/wikitext2@2048": "other"})
    with pytest.raises(InputError, match="smollm2-135m were measured on different tokens"):
        ProtocolRuns([*records, other])


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


@pytest.mark.parametrize(
    ("file", "settings"),
    [(BEFORE, (*WEIGHTS, *MXINT)), (TODAY, ACTIVATIONS), (AGAIN, WEIGHTS), (MORE_TEXT, WEIGHTS)],
)
def test_every_run_stands_in_a_table_and_all_read_the_same_tokens(file: Path, settings: tuple[str, ...]) -> None:
    records = list(read_runs(file))
    shown = [row.labels for row in by_setting(load_protocol_runs(file), "a", settings).rows if row.labels[1]]
    assert len(shown) == len({(run.model, run.setting, run.method) for run in records})
    assert {VARIANTS.get(run.method, run.method) for run in records if run.model == MODEL} <= set(METHODS)
    for key in ("ppl/wikitext2@2048", "ppl/file@2048"):
        assert len({run.tokens[key] for run in records}) == 1


def test_files_of_less_and_more_text_keep_to_theirs() -> None:
    for file, samples in ((AGAIN, 512), (MORE_TEXT, 2048)):
        assert {run.get("calib.samples") for run in read_runs(file) if run.model == MODEL} == {samples}


def test_one_file_alone_read_earlier_tokens() -> None:
    with pytest.raises(InputError, match="were measured on different tokens"):
        ProtocolRuns([*read_runs(BEFORE), *read_runs(TODAY)])
    assert ProtocolRuns([*read_runs(AGAIN), *read_runs(TODAY)]).runs  # those of today's tokens may meet


def test_the_accuracys_standard_error_is_what_the_page_says(records: list[Run]) -> None:
    for run in records:
        if run.model == MODEL:
            variances = [run.metrics[f"acc_stderr/{task}"] ** 2 for task in LQER_TASKS]
            assert 0.0045 < math.sqrt(sum(variances)) / len(LQER_TASKS) < 0.0075
