"""The main table by size: which runs fill it, by their settings and not by the file that they lie in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from helpers.configuration import compose_run

from lsiq.errors import InputError
from lsiq.experiment.composed import plain_config
from lsiq.report.compact import Run, read_runs, without_nulls
from lsiq.tables.collect import strangers
from lsiq.tables.papers.layout import sweep_jobs
from lsiq.tables.papers.main_by_size import ACTIVATIONS, WEIGHTS, main_by_size
from lsiq.tables.papers.size_runs import (
    LABELS,
    PEERS,
    SWEEP,
    VARIED,
    SizeRuns,
    contradiction_by_size,
    load_sizes,
    reports,
)
from lsiq.tables.protocol import ROOT
from lsiq.tables.study import Runs, load
from lsiq.tables.table import Table


@pytest.fixture(scope="module")
def records() -> dict[str, list[Run]]:
    return {file: read_runs(ROOT / "analysis" / "records" / f"{file}.jsonl") for file in LABELS}


@pytest.fixture(scope="module")
def study() -> Runs:
    return load()[0]


@pytest.fixture(scope="module")
def lsi(records: dict[str, list[Run]]) -> Run:
    """A run of today's lsi on the 90 M model, at 2 bits."""
    return next(
        run for run in records["scale-seeds"] if (run.model, run.setting, run.method) == ("l90", "w2a16g128", "lsi")
    )


def changed(run: Run, group: str, **values: Any) -> Run:
    """The run with other settings in a group of its configuration."""
    return replace(run, config={**run.config, group: {**run.config[group], **values}})


def column(table: Table, head: str) -> dict[tuple[str, ...], str]:
    """What a column says, by setting and method."""
    place = table.heads.index(head) - 3
    return {row.labels[:2]: row.write(table)[place] for row in table.rows}


def test_runs_of_any_file_fill_their_columns(records: dict[str, list[Run]], study: Runs, lsi: Run) -> None:
    rungs = [replace(lsi, model="llama-30m", seed=seed, tokens={}) for seed in (0, 1, 2)]
    rungs[2] = replace(rungs[2], metrics={**lsi.metrics, "excess/wikitext2@512": 0.5})
    opt = replace(lsi, model="tiny-opt", setting="w4a16g128")
    opt = changed(opt, "quant", weight={**lsi.config["quant"]["weight"], "bits": 4})
    before = main_by_size(SizeRuns(records), study, WEIGHTS)
    table = main_by_size(SizeRuns({**records, "of-tomorrow": [*rungs, opt]}), study, WEIGHTS)
    assert "30 M" not in before.heads
    assert table.heads[3:7] == ("11 M", "11 M, OPT", "30 M", "SmolLM2")
    (rung,) = [text for text in column(table, "30 M").values() if text != "–"]
    assert rung.endswith("(3)")
    assert column(table, "11 M, OPT")["w4", "lsi"].endswith("(1)")
    measured = {row: text for row, text in column(before, "SmolLM2").items() if text != "–"}
    assert measured
    assert measured.items() <= column(table, "SmolLM2").items()
    # Until it is run by this protocol a bundled model has the study's column, which says so.
    assert "11 M, OPT (study)" in before.heads
    assert column(before, "11 M, OPT (study)")["w2", "lsi"] == "–"


def test_a_column_is_of_one_training_of_its_model(records: dict[str, list[Run]], study: Runs, lsi: Run) -> None:
    assert "90 M" not in main_by_size(SizeRuns(records), study, WEIGHTS).heads, "earlier trainings have no column"
    own = replace(lsi, model="llama-90m", metrics={**lsi.metrics, "excess/wikitext2@512": 0.5})
    sizes = SizeRuns({**records, "of-tomorrow": [own]})
    measured = {row: text for row, text in column(main_by_size(sizes, study, WEIGHTS), "90 M").items() if text != "–"}
    assert measured == {("w2", "lsi"): "0.500 (1)"}
    # Elsewhere earlier trainings have the rows that the model itself was not run with.
    samples = {entry: sizes.sample("90 M", "w2", entry, "excess/wikitext2") for entry in ("lsi", "lsi-diagonal")}
    assert samples["lsi"] is not None
    assert samples["lsi"].values == (0.5,)
    assert samples["lsi-diagonal"] is not None
    assert len(samples["lsi-diagonal"].values) == 2


@pytest.mark.parametrize(
    ("group", "values", "why"),
    [
        ("calib", {"samples": 128}, "calib.samples"),
        ("calib", {"corpus": "bundled"}, "calib.corpus"),
        ("eval", {"windows": 200}, "eval.windows"),
        ("model", {"dtype": "bfloat16"}, "model.dtype"),
        ("model", {"outliers": 4}, "model"),
        ("quant", {"weight": {"group": 64}}, "quant.weight.group"),
        ("method", {"training": {"epochs": 20}}, "method.training.epochs"),
    ],
)
def test_a_run_with_other_settings_stands_nowhere_and_collecting_says_why(
    lsi: Run, group: str, values: dict[str, Any], why: str
) -> None:
    setting = "w2a16g64" if group == "quant" else lsi.setting
    other = changed(replace(lsi, model="llama-30m", setting=setting), group, **values)
    assert contradiction_by_size(replace(lsi, model="llama-30m")) is None
    assert SizeRuns({"of-tomorrow": [other]}).points == []
    assert strangers([other]) == {why: 1}


@pytest.mark.parametrize("setting", ["w3a16g128", "w4a4"])
def test_every_job_of_the_sweep_stands_in_the_table(lsi: Run, setting: str) -> None:
    jobs = {tuple(word for word in job if not word.startswith(VARIED)) for job in sweep_jobs(SWEEP)}
    assert len(jobs) == len(WEIGHTS.methods)
    for job in jobs:
        (method,) = (word.partition("=")[2] for word in job if word.startswith("method="))
        texts = ("calib.path=train.txt", "eval.path=c4.txt")
        config = plain_config(compose_run(f"sweep={SWEEP}", "model=tiny-opt", f"quant={setting}", *texts, *job))
        run = replace(lsi, model="tiny-opt", setting=setting, method=method, config=without_nulls(config))
        assert reports(run)
        assert contradiction_by_size(run) is None, method


def test_runs_that_only_look_like_a_method_stand_nowhere(records: dict[str, list[Run]], lsi: Run) -> None:
    # best of that file trains roundings, and its end starts from latent weights.
    best = [run for run in records["scale-seeds"] if run.method in ("best", "best-blocks")]
    assert SizeRuns({"of-tomorrow": best}).points == []
    assert contradiction_by_size(replace(lsi, method="a-label-of-my-own")) == "method"
    assert contradiction_by_size(replace(lsi, model="a-model-of-my-own")) == "model"


def test_the_later_run_of_a_model_and_seed_counts_whatever_its_file(records: dict[str, list[Run]]) -> None:
    first = next(
        run
        for run in records["scale"]
        if (run.model, run.setting, run.method) == ("tiny-llama", "w2a16g128", "gptq") and reports(run)
    )
    again = replace(first, created="2099-01-01", metrics={**first.metrics, "excess/file@512": 0.5})
    sizes = SizeRuns({"of-tomorrow": [again], **records})
    sample = sizes.sample("11 M", "w2", "gptq", "excess/file")
    assert sample is not None
    assert sample.values == (0.5,)


def test_other_tokens_are_an_error(records: dict[str, list[Run]], lsi: Run) -> None:
    other = replace(lsi, seed=7, tokens=dict.fromkeys(lsi.tokens, "0" * 16))
    with pytest.raises(InputError, match="measured on different tokens"):
        SizeRuns({**records, "of-tomorrow": [other]})


def test_the_key_to_former_labels_names_methods_of_the_same_settings(records: dict[str, list[Run]]) -> None:
    """lsird has lsi's parts in another order and without the equivalent transformation, which is idle there."""
    for file, runs in records.items():
        for run in runs:
            entry = LABELS[file].get(run.method)
            if reports(run) and run.model not in PEERS and entry in WEIGHTS.methods and run.method != "lsird":
                method = {**run.config["method"], "label": entry} if "label" in run.config["method"] else None
                named = replace(run, method=entry, config={**run.config, "method": method or run.config["method"]})
                assert contradiction_by_size(named) is None, f"{file}: {run.run_id}"


def test_each_column_says_how_it_was_measured_and_nothing_is_in_bold(
    records: dict[str, list[Run]], study: Runs
) -> None:
    sizes = load_sizes()
    for part in (WEIGHTS, ACTIVATIONS):
        for measure, text in (("excess", "wikitext2"), ("kl", "file")):
            table = main_by_size(sizes, study, part, measure, text)
            assert "**" not in table.markdown().partition("\n")[2]
            for head in table.heads[3:]:
                (note,) = [note for note in table.notes if note.startswith((f"{head} (", f"{head}:"))]
                assert "float perplexity" in note
    study_column = column(main_by_size(SizeRuns(records), study, ACTIVATIONS), "11 M, OPT (study)")
    assert study_column["w4a4", "best"].endswith("(3)"), "later and earlier runs of one seed count once"
