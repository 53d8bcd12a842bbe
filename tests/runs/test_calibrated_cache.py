"""Whole runs whose FP8 cache has scales from the calibration tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.configuration import compose_run
from helpers.interruption import at_rename, interrupt, only_run, outcome
from omegaconf import DictConfig
from safetensors.torch import load_file

import lsiq
import lsiq.experiment.stages
from lsiq.errors import ConfigError
from lsiq.experiment.run import run
from lsiq.results.store import BlockStore

SmallRun = Callable[..., DictConfig]
CALIBRATED = ("quant.kv.format=fp8", "quant.kv.scale=calibrated")


@pytest.fixture
def model(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["llama"]


def test_a_run_records_the_scales_of_each_block_and_stores_them_with_it(
    checkpoint: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    record = run(small_run(checkpoint, *CALIBRATED, "calib.samples=12"))
    assert "-kv-fp8-calibrated_rtn_" in record.run_id
    assert record.calibration["samples"] == 12, "all tokens count, not a few that measure errors"
    store = BlockStore(tmp_path / "runs" / record.run_id / "blocks")
    for row in record.blocks:
        scales = store.read(row["index"]).cache_scales
        assert scales is not None
        assert (row["metrics"]["key_scale"], row["metrics"]["value_scale"]) == (scales.key, scales.value)
    assert not store.changes_model()


def test_fixed_scales_of_the_calibration_tokens_cost_about_what_found_ones_do(model: Path, small_run: SmallRun) -> None:
    """And nothing but the cache is rounded: `quant=fp16`."""
    words = ["quant=fp16", "quant.weight.group=null", "quant.kv.format=fp8"]
    calibrated = run(small_run(model, *words, "quant.kv.scale=calibrated"))
    found = run(small_run(model, *words))
    tiny = run(small_run(model, *words, "quant.kv.scale=0.0001"))  # under which all saturates
    key = "kl/file@64"
    assert 0.25 < calibrated.metrics[key] / found.metrics[key] < 4
    assert tiny.metrics[key] > 100 * calibrated.metrics[key]


def test_round_to_nearest_beside_a_method_has_scales_of_its_own(model: Path, small_run: SmallRun) -> None:
    record = run(small_run(model, *CALIBRATED, "method=gptq"))
    alone = run(small_run(model, *CALIBRATED))
    key = "kl/file@64"
    beside = record.metrics[f"rtn/{key}"]
    assert beside == pytest.approx(alone.metrics[key], rel=0.05)  # those of the float model's keys; measured: 0.0015
    assert record.metrics[key] < beside


@pytest.mark.parametrize(
    "method",
    [
        ["method=gptq"],
        pytest.param(["method=omniquant", "method.training.epochs=1"], marks=pytest.mark.slow),
        pytest.param(
            ["method=best", *(f"method.weight_only.{at}training.epochs=1" for at in ("start.", ""))],
            marks=pytest.mark.slow,
        ),
        pytest.param(["method=prefix", "quant.activation.bits=8"], marks=pytest.mark.slow),
    ],
    ids=lambda words: words[0].partition("=")[2],
)
def test_a_run_that_was_stopped_goes_on_with_the_same_scales(
    method: list[str], model: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    words = [*CALIBRATED, *method, "paths.cache=null"]
    run(small_run(model, *words, f"paths.runs={tmp_path / 'other'}"))
    with at_rename("block_001.safetensors", interrupt), pytest.raises(KeyboardInterrupt):
        run(small_run(model, *words))
    run(small_run(model, *words))
    again, undisturbed = (outcome(only_run(tmp_path / name)[1]) for name in ("runs", "other"))
    assert again == undisturbed
    store = BlockStore(only_run(tmp_path / "runs")[1] / "blocks")
    assert all(store.read(index).cache_scales is not None for index in range(2))


def test_an_evaluation_that_is_repeated_has_the_scales_of_before(
    model: Path, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*CALIBRATED, "method=gptq", "paths.cache=null"]
    undisturbed = run(small_run(model, *words, f"paths.runs={tmp_path / 'other'}"))

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(lsiq.experiment.stages, "evaluate", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(small_run(model, *words))
    assert run(small_run(model, *words)).metrics == undisturbed.metrics


def test_a_finished_run_is_exported_with_the_scales_of_its_blocks(
    model: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    record = run(small_run(model, *CALIBRATED, "method=gptq", "eval=none"))
    words = [f"from={record.run_id}", "export=compressed-tensors"]
    exported = run(compose_run(*words, f"paths.runs={tmp_path / 'runs'}", "tracker=none"), words)
    entry = exported.exports["compressed-tensors"]
    assert entry["checks"][0]["difference"] < 1e-5  # measured: 0.0
    tensors = load_file(Path(entry["folder"]) / "model.safetensors")
    for row in record.blocks:
        for letter, name in {"k": "key", "v": "value"}.items():
            scale = tensors[f"model.layers.{row['index']}.self_attn.{letter}_scale"]
            assert scale.item() == row["metrics"][f"{name}_scale"]


@pytest.mark.slow
def test_a_plan_measured_as_the_method_rounds_has_scales_too(model: Path, small_run: SmallRun) -> None:
    words = ["method=gptq", "quant.allocate.bits=3.5", "quant.allocate.choices=[w2g32,w4g32]", "eval=none"]
    record = run(small_run(model, *CALIBRATED, *words, "quant.allocate.rounding=method"))
    assert all(row["metrics"]["key_scale"] > 0 for row in record.blocks)


@pytest.mark.slow
def test_a_dry_run_tries_the_cache_out(model: Path, small_run: SmallRun) -> None:
    assert run(small_run(model, *CALIBRATED, "dry_run=true")).seconds["quantize"] > 0


def test_from_python_calibrated_scales_want_tokens(tmp_path: Path) -> None:
    model = lsiq.load_model("tiny-llama")
    fmt = lsiq.format("w4a16-sym", *CALIBRATED)
    with pytest.raises(ConfigError, match=r"calibration=None: quant\.kv\.scale=calibrated needs calibration tokens"):
        lsiq.quantize(model, lsiq.recipe("rtn"), fmt)
    quantised = lsiq.quantize(model, lsiq.recipe("rtn"), fmt, lsiq.tokens("bundled", samples=2, seqlen=32))
    assert quantised.block(0).cache_scales is not None
    assert quantised.logits(torch.arange(8)[None]).isfinite().all()
    (check,) = quantised.export("compressed-tensors", tmp_path / "export")["checks"]
    assert check["difference"] < 1e-5
