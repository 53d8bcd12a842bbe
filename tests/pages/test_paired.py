"""The page of paired tests: whom it pairs, and that it says what `lsiq compare` says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig

from lsiq.errors import InputError
from lsiq.experiment.run import run
from lsiq.report.compact import Run, read_runs
from lsiq.report.significance import compare, compare_means
from lsiq.tables.collect import collect
from lsiq.tables.papers.paired import ACTIVATIONS, WEIGHTS, comparison, paired, paired_in_short
from lsiq.tables.papers.size_runs import SizeRuns
from lsiq.tables.protocol import ROOT

SmallRun = Callable[..., DictConfig]


@pytest.fixture(scope="module")
def study() -> list[Run]:
    return read_runs(ROOT / "analysis" / "records" / "study-recipes.jsonl")


def made(study: list[Run], method: str, seed: int, kl: float, blocks: int = 12) -> Run:
    """A run of the 90 M model at 2 bits with these means of its windows' divergence, up to a little noise."""
    first = next(run for run in study if (run.model, run.setting, run.method) == ("llama-90m", "w2a16g128", method))
    noise = np.random.default_rng(seed).normal(scale=1e-4, size=blocks)
    return replace(first, seed=seed, window_means={"kl/file@512": [kl + float(value) for value in noise]})


def test_collected_means_give_the_verdict_of_the_windows(
    checkpoints: dict[str, Path], small_run: SmallRun, tmp_path: Path
) -> None:
    coarse = run(small_run(checkpoints["llama"], "quant.weight.bits=2"))
    fine = run(small_run(checkpoints["llama"], "quant.weight.bits=4"))
    collect([tmp_path / "runs"], tmp_path / "records.jsonl", dirty=True)
    means = {line.run_id: line.window_means for line in read_runs(tmp_path / "records.jsonl")}
    whole = compare(tmp_path / "runs" / coarse.run_id, tmp_path / "runs" / fine.run_id)
    assert [difference.key for difference in whole] == list(means[fine.run_id]) == ["kl/file@64", "loss/file@64"]
    for expected in whole:
        found = compare_means(expected.key, means[coarse.run_id][expected.key], means[fine.run_id][expected.key])
        assert found.verdict == expected.verdict
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-3)
    with pytest.raises(InputError, match="3 and 2 blocks of windows; only equal windows compare"):
        compare_means("kl/file@64", [0.1, 0.2, 0.3], [0.1, 0.2])


def test_a_run_without_its_windows_is_collected_without_means(
    checkpoints: dict[str, Path], small_run: SmallRun, tmp_path: Path
) -> None:
    record = run(small_run(checkpoints["llama"], "quant.weight.bits=4"))
    (tmp_path / "runs" / record.run_id / "windows.parquet").unlink()
    collect([tmp_path / "runs"], tmp_path / "records.jsonl", dirty=True)
    (line,) = read_runs(tmp_path / "records.jsonl")
    assert line.window_means == {}
    assert "window_means" not in (tmp_path / "records.jsonl").read_text()


def test_runs_are_paired_by_seed(study: list[Run]) -> None:
    runs = [made(study, "lsi", 0, 0.10), made(study, "lsi", 1, 0.10), made(study, "lsi", 2, 0.10)]
    others = [made(study, "omniquant", 0, 0.12), made(study, "omniquant", 1, 0.1), made(study, "omniquant", 5, 0.3)]
    sizes = SizeRuns({"of-tomorrow": [*runs, *others]})
    found = comparison(sizes, "90 M", "w2", ("lsi", "omniquant"), "kl/file")
    assert found is not None
    assert found.write() == "+0.0100 (better 1, level 1)"
    back = comparison(sizes, "90 M", "w2", ("omniquant", "lsi"), "kl/file")
    assert back is not None
    assert back.write() == "-0.0100 (level 1, worse 1)"
    assert comparison(sizes, "90 M", "w2", ("lsi", "gptq"), "kl/file") is None
    (row,) = paired(sizes).rows
    assert row.labels == ("90 M", "w2", "lsi", "omniquant")
    assert [cell.text for cell in row.cells] == ["+0.0100 (better 1, level 1)", "–", "–", "–"]


def test_runs_measured_in_other_types_or_of_another_model_are_no_pair(study: list[Run]) -> None:
    method, other = made(study, "lsi", 0, 0.10), made(study, "omniquant", 0, 0.12)
    float32 = replace(other, config={**other.config, "eval": {**other.config["eval"], "tf32": None}})
    before = replace(other, model="l90")
    for stranger in (float32, before):
        sizes = SizeRuns({"of-tomorrow": [method, stranger]})
        assert comparison(sizes, "90 M", "w2", ("lsi", "omniquant"), "kl/file") is None


def test_the_study_on_the_90_m_rung_has_its_tests(study: list[Run]) -> None:
    sizes = SizeRuns({"study-recipes": study})
    found = comparison(sizes, "90 M", "w3", ("lsi", "omniquant"), "kl/wikitext2")
    assert found is not None
    assert found.verdicts == {"better": 3}


def test_in_short_comparisons_are_counted_over_settings_texts_and_seeds(study: list[Run]) -> None:
    runs = [made(study, "lsi", 0, 0.10), made(study, "lsi", 1, 0.10), made(study, "lsi", 2, 0.13)]
    others = [made(study, "omniquant", 0, 0.12), made(study, "omniquant", 1, 0.10), made(study, "omniquant", 2, 0.12)]
    table = paired_in_short(SizeRuns({"of-tomorrow": [*runs, *others]}), WEIGHTS, "t")
    assert table.heads == ("method", "than", "measure", "90 M")
    (row,) = table.rows
    assert row.labels == ("lsi", "omniquant", "divergence")
    assert [cell.text for cell in row.cells] == ["1 of 3, 1 worse"]
    assert not paired_in_short(SizeRuns({"of-tomorrow": [*runs, *others]}), ACTIVATIONS, "t").rows
