"""A narrow model stands for a large one in a dry run: costs are scaled by what they grow with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.configuration import CONF, compose_run
from helpers.marks import slow_but
from helpers.models import SHAPES
from omegaconf import DictConfig
from transformers import AutoConfig, AutoModelForCausalLM

from lsiq.errors import ConfigError
from lsiq.experiment.config import parse
from lsiq.experiment.narrow_model import LONG, Shape, narrowed
from lsiq.experiment.run import run
from lsiq.models.families import find_spec

SmallRun = Callable[..., DictConfig]
LARGE = ("llama-2-7b", "llama-2-70b", "opt-125m", "opt-6.7b")


def built(shape: dict) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))


@pytest.mark.parametrize("name", LARGE)
def test_counts_are_those_of_the_model_and_of_the_narrow_one(name: str) -> None:
    config = parse(compose_run(f"model={name}", "quant=w4a16g128", "dry_run=true"))
    true = dict(config.model.architecture or {})
    for shape in ({**true, "num_hidden_layers": 1}, narrowed(true, config.quant, 1)):
        model, spec = built(shape), find_spec(shape["model_type"], name)
        block = model.get_submodule(f"{spec.blocks}.0")
        linears = [block.get_submodule(linear).weight for linear in spec.linears]
        found = Shape.of(shape)
        assert found.weights == sum(weight.numel() for weight in linears)
        assert all(weight.shape[1] % 128 == 0 for weight in linears)
        outside = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(f"{spec.blocks}."))
        assert found.outside == pytest.approx(outside, rel=0.01)  # norms and two positions of OPT are left out


def test_the_narrow_model_has_positions_for_what_is_tried() -> None:
    config = parse(compose_run("quant=w4a16g128", "dry_run=true"))
    assert SHAPES["opt"]["max_position_embeddings"] < LONG
    assert narrowed(SHAPES["opt"], config.quant, 1)["max_position_embeddings"] == LONG
    assert (
        narrowed({**SHAPES["opt"], "max_position_embeddings": 2048}, config.quant, 1)["max_position_embeddings"] == 2048
    )


METHODS = sorted(file.stem for file in (CONF / "method").glob("*.yaml"))


@pytest.mark.parametrize("method", slow_but(["gptq", "lqer", "lsi", "e2e"], METHODS))
def test_every_method_is_estimated(method: str, small_run: SmallRun, checkpoints: dict[str, Path]) -> None:
    own = [f"method={method}"]
    if "run: ???" in (CONF / "method" / f"{method}.yaml").read_text():
        own += ["method.run=x"]  # only its shape would be looked at
    record = run(small_run(checkpoints["llama"], *own, "dry_run=true", "calib.seqlen=64", "calib.samples=4"))
    assert record.status == "dry run"
    assert record.seconds["quantize"] > 0
    assert record.peak_bytes["host"] > 0


@pytest.mark.slow
def test_training_whole_models_needs_sixteen_bytes_for_each_weight(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = ["model=llama-2-7b", "quant=w2a16g128", "calib=random", "eval=none", "dry_run=true"]
    run(compose_run("method=best", "method.weight_only.trained=all", *model))
    said = " ".join(capsys.readouterr().out.split())
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    needed = float(said.split(" GiB for what is trained at once")[0].rpartition(" ")[2])
    assert needed == pytest.approx(16 * weights / 2**30, rel=0.02)  # besides weights, step sizes and norms are trained
    assert {"load", "start", "quantize"} <= set(said.split())


def test_a_format_that_does_not_fit_the_true_width_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"quant\.weight\.group=96 does not divide hidden_size=4096 .*group=64 "):
        run(compose_run("model=llama-2-7b", "method=best", "quant.weight.group=96", "dry_run=true"))
