"""Runs behind hosts: what is measured, tuned, counted and exported of a model that is turned or has a prefix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.evaluations import NO_CACHE, halved, unchanged
from helpers.hosts import W4A4, first_block, quantised, seeded, some_tokens
from helpers.marks import slow
from helpers.models import load_small
from omegaconf import DictConfig

import lsiq.experiment.stages
from lsiq.errors import ConfigError, InputError
from lsiq.evals.likelihood import measure_pairs
from lsiq.evals.perplexity import perplexity
from lsiq.evals.windows import FLOAT, Variant, measure_windows
from lsiq.experiment.run import run
from lsiq.formats.activation import Activation
from lsiq.methods.base import Method
from lsiq.methods.lqer import LQER
from lsiq.methods.rotate import Rotate
from lsiq.methods.rtn import RTN

SmallRun = Callable[..., DictConfig]


@pytest.mark.parametrize("then", [slow("rtn"), "gptq", slow("omniquant")])
def test_a_run_with_all_hosts_leaves_its_record(checkpoint: Path, small_run: SmallRun, then: str) -> None:
    overrides = [] if then != "omniquant" else ["method.then.then.training.epochs=1"]
    record = run(
        small_run(
            checkpoint,
            "quant=w4a4",
            "quant.weight.group=null",
            "method=prefix",
            "method@method.then=rotate",
            f"method@method.then.then={then}",
            "method.tokens=[17,0]",
            "model.outliers=2",
            *overrides,
        )
    )
    assert record.prefix == [17, 0]
    assert record.config["model"]["name"] == f"{checkpoint.name}+2outliersx30"
    assert record.run_id.startswith(f"{checkpoint.name}+2outliersx30_w4a4_prefix+rotate")
    assert {"ppl/file@64", "prefixed/ppl/file@64", "rtn/ppl/file@64"} <= set(record.metrics)
    assert all(0 < block["metrics"]["online_share"] < 1 for block in record.blocks)
    assert record.average_bits is not None
    assert record.average_bits > 4.2  # signs and small matrices are counted
    share = sum(block["metrics"]["online_share"] for block in record.blocks) / len(record.blocks)
    macs, width = record.cost["macs_per_token"], 96
    head_and_turns = 4096 * width + 2 * width**2
    assert macs["16x16"] - head_and_turns == pytest.approx(share * macs["4x4"])


def test_fine_tuning_starts_from_a_prepared_run(checkpoint: Path, small_run: SmallRun) -> None:
    parent = run(small_run(checkpoint, "method=prefix", "method@method.then=rotate", "method.tokens=[17]"))
    tuned = run(small_run(checkpoint, "method=lsi-finetune", f"method.run={parent.run_id}", "method.training.epochs=0"))
    assert tuned.prefix == parent.prefix
    assert tuned.metrics["ppl/file@64"] == parent.metrics["ppl/file@64"]


def test_a_run_that_goes_on_with_its_evaluation_has_the_prepared_model_again(
    checkpoint: Path, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ["method=prefix", "method@method.then=rotate", "method.tokens=[17]"]
    undisturbed = run(small_run(checkpoint, *made, f"paths.runs={tmp_path / 'other'}"))

    def out_of_memory(*args: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(lsiq.experiment.stages, "evaluate", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(small_run(checkpoint, *made))
    again = run(small_run(checkpoint, *made))
    assert again.metrics == undisturbed.metrics
    assert again.prefix == [17]


@pytest.mark.slow
def test_fine_tuning_may_begin_with_a_host(checkpoint: Path, small_run: SmallRun) -> None:
    alone = run(small_run(checkpoint, "method=prefix", "method@method.then=rotate", "method.tokens=[17]"))
    start = ["method=e2e", "method.run=null", "method@method.start=prefix", "method@method.start.then=rotate"]
    both = run(small_run(checkpoint, *start, "method.start.tokens=[17]", "method.training.epochs=0"))
    assert both.prefix == [17]
    assert both.metrics["ppl/file@64"] == alone.metrics["ppl/file@64"]
    trained = run(small_run(checkpoint, *start, "method.start.tokens=[17]", "method.training.epochs=2"))
    assert all(block["metrics"]["loss_last"] < block["metrics"]["loss_first"] for block in trained.blocks)
    assert trained.cost["macs_per_token"] == alone.cost["macs_per_token"]


def test_prepared_models_are_measured_beside_the_float_one(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    prepared = Rotate(then=RTN()).prepare_model(model.with_prefix(torch.tensor([5, 9])), None, 2, seeded())
    variants = {
        FLOAT: Variant(unchanged, "float"),
        "halved/": Variant(halved),
        "": Variant(halved, prepared=prepared),
        "after/": Variant(unchanged, prepared=prepared),
    }
    steps: list[None] = []
    windows = some_tokens(3, 32)
    found = measure_windows(model, {"x": windows}, variants, 2, True, NO_CACHE, lambda: steps.append(None))["x"]
    assert len(steps) == 2 * model.depth  # one pass for each model, not one for each variant
    for prefix, variant in variants.items():
        alone = perplexity(variant.prepared or model, windows, 2, variant.function_of, lambda: None)
        assert found[prefix].scores.perplexity().loss == pytest.approx(alone.loss, abs=1e-6)  # measured: 0.0
    assert found["after/"].scores.perplexity().loss != pytest.approx(found[FLOAT].scores.perplexity().loss, abs=1e-3)
    before = found[FLOAT].scores.losses
    turned_only = Rotate(then=RTN()).prepare_model(model, None, 2, seeded())
    variants = {FLOAT: Variant(unchanged, "float"), "": Variant(unchanged, prepared=turned_only)}
    again = measure_windows(model, {"x": windows}, variants, 2, True, NO_CACHE, lambda: None)["x"][""].scores
    assert again.divergence is not None
    assert again.divergence.abs().max() < 1e-5  # measured: 4.8e-7
    assert torch.allclose(again.losses, before, atol=1e-4)  # measured: 2.9e-6


def test_answers_are_scored_after_the_prefix(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    pairs = [([5, 9, 30], [40, 41]), ([5, 9, 30, 31], [50])]
    long = [([5, 9] + [30] * 140, [40])]  # more than the 128 positions: the beginning is lost, of the text alone
    after = model.with_prefix(torch.tensor([5, 9]))
    variants = {FLOAT: Variant(unchanged), "": Variant(unchanged, prepared=after)}
    found, _ = measure_pairs(model, [*pairs, *long], variants, 64, NO_CACHE, lambda _: lambda: None)
    whole, _ = measure_pairs(
        model, [([5, 9, *c], w) for c, w in pairs], {"": Variant(unchanged)}, 64, NO_CACHE, lambda _: lambda: None
    )
    assert torch.allclose(found[""].log_likelihood[:2], whole[""].log_likelihood, atol=1e-4)  # measured: 1e-6
    assert not torch.allclose(found[FLOAT].log_likelihood[:2], whole[""].log_likelihood, atol=1e-2)
    assert found[""].log_likelihood.isfinite().all()


@pytest.mark.slow
def test_planted_outliers_have_references_of_their_own(checkpoint: Path, small_run: SmallRun) -> None:
    settings = ["method=gptq", "quant=w4a4", "quant.weight.group=null"]
    run(small_run(checkpoint, *settings))
    planted = run(small_run(checkpoint, *settings, "model.outliers=2"))
    assert planted.cached == {}
    assert set(run(small_run(checkpoint, *settings, "model.outliers=2", "seed=1")).cached) == {
        "float/ppl/file@64",
        "rtn/ppl/file@64",
    }


@pytest.mark.slow
def test_blocks_that_need_rotations_or_a_prefix_are_not_exported(
    checkpoints: dict[str, Path], small_run: SmallRun
) -> None:
    rotated = run(small_run(checkpoints["llama"], "method=rotate", "method.places=[down]"))
    residual = run(small_run(checkpoints["llama"], "method=rotate", "method.places=[residual]"))
    for parent, message in ((rotated, "inputs are rotated"), (residual, "a rotated residual stream or a prefix")):
        tune = ["method=lsi-finetune", f"method.run={parent.run_id}", "method.training.epochs=0"]
        with pytest.raises(InputError, match=message):
            run(small_run(checkpoints["llama"], *tune, "export=plain", "export.verify=false"))


def test_values_turned_in_place_are_exported(checkpoints: dict[str, Path], small_run: SmallRun) -> None:
    record = run(small_run(checkpoints["llama"], "method=rotate", "method.places=[value]", "export=plain"))
    assert record.exports["plain"]["status"] == "finished"


def test_a_prefix_that_does_not_fit_the_positions_is_refused(checkpoint: Path, small_run: SmallRun) -> None:
    overrides = ["method=prefix", "method.tokens=[1,2,3]", "calib.seqlen=128"]
    with pytest.raises(ConfigError, match=r"calib\.seqlen=128: the model has 128 positions and the prefix takes 3"):
        run(small_run(checkpoint, *overrides))
    with pytest.raises(InputError, match=r"method\.tokens: 4096 is not a token of the model"):
        run(small_run(checkpoint, "method=prefix", "method.tokens=[4096]"))
    with pytest.raises(InputError, match=r"method\.threshold=1000000"):
        run(small_run(checkpoint, "method=prefix", "method.bos=false", "method.threshold=1e6"))
    with pytest.raises(InputError, match=r"model\.outliers=97: .* channels; use fewer"):
        run(small_run(checkpoint, "model.outliers=97"))


@pytest.mark.parametrize("outside", [False, True], ids=["rotate+lqer", "lqer+rotate"])
def test_a_low_rank_product_repairs_the_turned_weights(checkpoint: Path, outside: bool) -> None:
    block, hidden = first_block(load_small(checkpoint))
    full = max(min(block.weights[name].shape) for name in block.linears)
    quant = replace(W4A4, activation=Activation(bits=16))
    places = ["value", "norm", "output", "down", "query_key"]

    def lqer(then: Method) -> LQER:
        return LQER(scale="covariance", rank=full, then=then, factors="float16")

    def rotate(then: Method) -> Rotate:
        return Rotate(places=places, then=then)  # type: ignore[arg-type]

    result = quantised(lqer(rotate(RTN())) if outside else rotate(lqer(RTN())), block, hidden, quant)
    expected = block.with_weights({})(hidden)
    found = block.with_result(result)(hidden)
    # A product of full rank repairs all of the error, if it reads turned inputs and is taken against turned weights.
    assert (found - expected).norm() / expected.norm() < 1e-3  # measured: at most 7.4e-5
