"""A difference of two runs comes with an interval that means what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig

from lsiq.errors import InputError
from lsiq.experiment.run import run
from lsiq.report.significance import BLOCK, Difference, block_means, bootstrap_interval, compare

SmallRun = Callable[..., DictConfig]


@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_the_interval_covers_the_truth_as_often_as_it_says(kind: str) -> None:
    draw = np.random.default_rng(1)
    trials, windows, covered = 600, 32, 0
    for _ in range(trials):
        noise = draw.normal(size=windows) if kind == "normal" else draw.exponential(size=windows) - 1
        low, high = bootstrap_interval(0.3 + noise, resamples=1000)
        covered += low <= 0.3 <= high
    # Measured: 0.950 and 0.942. Three standard errors of 600 trials are 0.027. In 3000 trials each the interval covers
    # 0.943 and 0.945; the plain percentile interval covers 0.932 and 0.919.
    assert covered / trials == pytest.approx(0.95, abs=0.027)


def test_the_interval_is_the_same_on_every_call_and_narrows_with_windows() -> None:
    differences = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap_interval(differences)
    assert (low, high) == bootstrap_interval(differences)
    few_low, few_high = bootstrap_interval(differences[:25])
    assert (few_high - few_low) / (high - low) == pytest.approx(4, rel=0.35)  # measured: 3.7
    assert bootstrap_interval(np.full(10, 0.25)) == (0.25, 0.25)


@pytest.mark.slow
def test_the_interval_covers_the_truth_where_neighbours_err_alike() -> None:
    draw = np.random.default_rng(1)
    trials, windows, covered = 400, 512, {1: 0, 32: 0}
    for _ in range(trials):
        articles = draw.normal(size=windows // 8).repeat(8)  # eight windows an article
        noise = np.roll(articles, draw.integers(8)) + 0.5 * draw.normal(size=windows)
        for block in covered:
            low, high = bootstrap_interval(block_means(0.3 + noise, block), resamples=500)
            covered[block] += low <= 0.3 <= high
    assert covered[32] / trials > 0.9  # measured: 0.95
    assert covered[1] / trials < 0.7  # measured: 0.57


def test_blocks_hold_every_pair_and_are_never_too_few() -> None:
    differences = np.arange(100.0)
    assert len(block_means(differences, 1)) == 100
    assert len(block_means(differences, 10)) == 10
    assert len(block_means(differences, 32)) == 8
    assert block_means(differences[:96], 12).mean() == pytest.approx(differences[:96].mean())
    assert len(block_means(np.arange(400.0), BLOCK)) == 12, "32 windows each, and a few more"


def test_the_verdict_follows_the_interval() -> None:
    def verdict(mean: float, low: float, high: float, lower_is_better: bool = True) -> str:
        return Difference("loss/x@8", mean, low, high, 9, lower_is_better).verdict

    assert verdict(-0.1, -0.2, -0.05) == "B is better"
    assert verdict(0.1, 0.05, 0.2) == "A is better"
    assert verdict(0.1, 0.05, 0.2, lower_is_better=False) == "B is better"
    assert verdict(0.1, -0.05, 0.2) == "not told apart"


def test_two_runs_are_compared_window_by_window(
    checkpoints: dict[str, Path], small_run: SmallRun, tmp_path: Path
) -> None:
    coarse = run(small_run(checkpoints["llama"], "quant.weight.bits=2"))
    fine = run(small_run(checkpoints["llama"], "quant.weight.bits=4"))
    runs = tmp_path / "runs"
    divergence, loss = compare(runs / coarse.run_id, runs / fine.run_id)
    assert (divergence.key, loss.key) == ("kl/file@64", "loss/file@64")
    expected = np.log(fine.metrics["ppl/file@64"]) - np.log(coarse.metrics["ppl/file@64"])
    assert loss.mean == pytest.approx(expected, rel=1e-6)
    assert divergence.mean == pytest.approx(fine.metrics["kl/file@64"] - coarse.metrics["kl/file@64"], rel=1e-5)
    assert all(found.low < found.mean < found.high for found in (divergence, loss))
    for same in compare(runs / fine.run_id, runs / fine.run_id):
        assert (same.mean, same.low, same.high, same.verdict) == (0.0, 0.0, 0.0, "not told apart")


def test_items_of_tasks_are_compared_too(checkpoints: dict[str, Path], small_run: SmallRun, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks = ("eval=zeroshot-bundled", "eval.path=null", "eval.items=10")
    coarse = run(small_run(checkpoints["llama"], "quant.weight.bits=2", *tasks))
    fine = run(small_run(checkpoints["llama"], "quant.weight.bits=4", *tasks))
    found = compare(tmp_path / "runs" / coarse.run_id, tmp_path / "runs" / fine.run_id)
    assert [difference.key for difference in found] == ["acc/bundled_cloze", "acc_norm/bundled_cloze"]
    for difference in found:
        assert difference.mean == pytest.approx(fine.metrics[difference.key] - coarse.metrics[difference.key])
    other = run(small_run(checkpoints["llama"], *tasks, "eval.items=9"))
    with pytest.raises(InputError, match=r"items=10.*items=9"):
        compare(tmp_path / "runs" / coarse.run_id, tmp_path / "runs" / other.run_id)


def test_other_tokens_are_refused(checkpoints: dict[str, Path], small_run: SmallRun, tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text("".join(f"A {n}th cart carried {n * 3} bales of wool to the market.\n" for n in range(90)))
    first = run(small_run(checkpoints["llama"]))
    second = run(small_run(checkpoints["llama"], f"eval.path={text}"))
    with pytest.raises(InputError, match=r"only equal protocols compare"):
        compare(tmp_path / "runs" / first.run_id, tmp_path / "runs" / second.run_id)
