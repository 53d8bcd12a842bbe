"""dry_run=true says from a model's shape alone what a run then takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from helpers.configuration import compose_run
from helpers.marks import slow
from helpers.models import SHAPES, save_model
from omegaconf import DictConfig

from lsiq.errors import InputError
from lsiq.experiment.config import parse
from lsiq.experiment.probe import EvaluationCost, widened
from lsiq.experiment.run import run
from lsiq.methods.finetune import FineTune
from lsiq.methods.finetune.form import GIB, Load
from lsiq.models.shape import Shape

SmallRun = Callable[..., DictConfig]
# Runs in a process of its own, whose memory is that of the run alone.
ALONE = """
import json, sys
from helpers.configuration import compose_run
from lsiq.experiment.run import run
record = run(compose_run(*json.loads(sys.argv[1])))
print(json.dumps([record.status, record.peak_bytes, record.seconds]))
"""


def alone(*overrides: str) -> tuple[str, dict[str, int], dict[str, float]]:
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path}\n{ALONE}", json.dumps(overrides)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_estimated_peak_is_within_a_fifth_of_the_measured_one(tmp_path: Path) -> None:
    shape = {**SHAPES["llama"], "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    written = "{" + ",".join(f"{key}:{value}" for key, value in shape.items()) + "}"
    job = [
        *("model=llama-2-7b", "model.weights=random", f"model.architecture={written}", "model.seqlen=128"),
        *("quant=w4a16", "method=smoothquant", "calib=random", "calib.samples=48", "calib.batch=4", "eval=random"),
        *("eval.windows=8", "eval.batch=4", "tracker=none", f"paths.runs={tmp_path}"),
    ]
    status, estimated, stages = alone(*job, "dry_run=true")
    assert status == "dry run"
    assert list(tmp_path.iterdir()) == []
    _, measured, seconds = alone(*job)
    assert abs(estimated["host"] / measured["host"] - 1) < 0.2  # measured: 0.06
    assert set(stages) == {"load", "quantize", "evaluate", "total"} <= set(seconds)


@pytest.mark.parametrize(
    "method", [["method=rotate", "method.steps=9"], ["method=best", "method.weight_activation.start.then.steps=9"]]
)
def test_a_rotation_is_not_trained_and_that_is_said(
    method: list[str], checkpoints: dict[str, Path], small_run: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    with patch("lsiq.linalg.narrow_rotation.narrow_rotation", side_effect=AssertionError("it was trained")):
        record = run(small_run(checkpoints["llama"], "quant=w4a4", *method, "dry_run=true"))
    assert record.status == "dry run"
    assert "the training of the rotation" in " ".join(capsys.readouterr().out.split())


def test_a_shape_without_weights_is_enough(tmp_path: Path) -> None:
    folder = save_model(SHAPES["opt"], tmp_path / "model")
    (folder / "model.safetensors").unlink()
    job = ["method=lsi", "method.training.epochs=9", "eval=bundled", "eval.seqlen=64", "calib.seqlen=16"]
    record = run(
        compose_run(f"model.path={folder}", *job, "quant.weight.group=32", "calib.samples=100", "dry_run=true")
    )
    assert record.status == "dry run"
    assert record.seconds["quantize"] > 0
    assert record.seconds["evaluate"] > 0


@pytest.mark.parametrize("method", ["gptq", slow("best")])  # best is estimated from a narrow model
def test_a_text_that_holds_too_few_windows_is_said_at_once(checkpoint: Path, small_run: SmallRun, method: str) -> None:
    words = [f"method={method}", "calib.samples=5000", "calib.seqlen=64", "dry_run=true"]
    with pytest.raises(InputError, match=r"text\.txt: the text holds \d+ windows of calib\.seqlen=64 tokens"):
        run(small_run(checkpoint, *words))
    assert run(small_run(checkpoint, *words, "calib.windows=random")).status == "dry run"


@pytest.mark.slow
def test_the_form_of_the_end_stage_follows_from_the_memory(
    checkpoints: dict[str, Path], small_run: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ["method=best", "method.weight_only.start.training.epochs=1", "quant.weight.group=32", "dry_run=true"]
    for memory, said in (("null", "by all, 8 sequences"), ("0.001", "no form of best fits 0.0 GiB; the least, grid")):
        assert run(small_run(checkpoints["llama"], *job, f"method.weight_only.memory={memory}")).status == "dry run"
        assert said in capsys.readouterr().out


@pytest.mark.slow
def test_the_form_is_the_one_that_the_run_takes_within_the_same_memory(
    checkpoints: dict[str, Path], small_run: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ["method=best", "method.weight_only.start.training.epochs=1", "method.weight_only.training.epochs=1"]
    job += ["quant.weight.group=32", "device=cpu", "eval.rtn=false"]
    method = parse(small_run(checkpoints["llama"], *job)).method
    assert isinstance(method, FineTune)
    load = Load(Shape(74_000, 96, 160, 4096, 0), 2, 4, 32, 32, 4, 4)
    # A little more than what all weights take, and less than that beside the embeddings, which a CPU does not count.
    job.append(f"method.weight_only.memory={load.bytes(method, 'all', None, 1, GIB) / GIB * 1.02}")
    run(small_run(checkpoints["llama"], *job, "dry_run=true"))
    assert "trains through the whole model by all, 1 sequences at once" in capsys.readouterr().out
    assert run(small_run(checkpoints["llama"], *job)).training_form["trained"] == "all"


def test_a_dry_run_decides_nothing_about_the_run(checkpoint: Path, small_run: SmallRun, tmp_path: Path) -> None:
    run(small_run(checkpoint, "dry_run=true"))
    assert not (tmp_path / "runs").exists()
    assert run(small_run(checkpoint)).status == "finished"


def test_what_cannot_be_estimated_says_so() -> None:
    with pytest.raises(InputError, match=r"the shape of .* is not known here; give model\.path"):
        run(compose_run("model=llama-2-7b", "model.architecture=null", "dry_run=true"))


def test_reading_ahead_hides_what_runs_beside_it() -> None:
    cost = EvaluationCost(8, models=2, passes=1, preparing=0.3, block_seconds=0, score_seconds=0, peaks={})
    # Two blocks were tried: each prepared in 0.3 s, the last one then run in 0.1.
    assert cost.pass_seconds(0.7, 2, depth=3, reading=1.0, ahead=True) == pytest.approx(3 * 1.3 + 0.1)
    # The first prepared, then both run in 0.5 s each.
    assert cost.pass_seconds(1.3, 2, depth=3, reading=0.0, ahead=True) == pytest.approx(0.3 + 3 * 0.5)
    assert cost.pass_seconds(0.7, 2, depth=3, reading=1.0, ahead=False) == pytest.approx(3 * (0.35 + 1.0))


def test_peaks_are_those_of_the_widest_precision_that_blocks_may_need() -> None:
    widest = widened(parse(compose_run("method=lsi-corner", "method@method.then=gptq")).method)
    assert widest.then.precision == "float64"
    chosen = parse(compose_run("method=gptq", "method.precision=float32")).method
    assert widened(chosen) == chosen
