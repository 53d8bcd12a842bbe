"""Calibration text that the float model writes itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.configuration import compose_run
from helpers.hosts import logits
from helpers.models import load_small
from omegaconf import DictConfig

from lsiq.assets import bundled_model
from lsiq.calib.generated_text import write_sequences
from lsiq.errors import ConfigError
from lsiq.experiment.config import parse
from lsiq.experiment.run import run
from lsiq.models.outliers import PlantedOutliers


def test_a_seed_gives_its_tokens_and_another_seed_others(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    tokens = write_sequences(model, 3, 20, seed=1)
    assert tokens.shape == (3, 20)
    assert tokens.dtype == torch.long
    assert torch.equal(tokens, write_sequences(model, 3, 20, seed=1))
    assert not torch.equal(tokens, write_sequences(model, 3, 20, seed=2))
    assert not torch.equal(tokens[0], tokens[1])
    assert not torch.isin(tokens, torch.tensor(model.tokenizer.all_special_ids)).any()


@pytest.mark.slow
def test_what_is_written_follows_the_models_own_distribution() -> None:
    model = load_small(bundled_model("tiny-llama"))
    tokens = write_sequences(model, 6, 128, seed=0)
    scores = logits(model, tokens)[:, :-1].log_softmax(-1)
    surprise = -scores.gather(-1, tokens[:, 1:, None]).mean().item()
    entropy = -(scores.exp() * scores).sum(-1).mean().item()
    # Drawn from these very distributions, the text is as surprising as they are uncertain; measured: 0.04 apart.
    assert surprise == pytest.approx(entropy, abs=0.15)


def test_planted_outliers_do_not_change_what_is_written(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    planted = replace(model, planting=PlantedOutliers(4, 30.0))
    assert torch.equal(write_sequences(planted, 2, 16, seed=0), write_sequences(model, 2, 16, seed=0))


def test_written_sequences_join_the_drawn_ones(checkpoint: Path, small_run: Callable[..., DictConfig]) -> None:
    drawn = run(small_run(checkpoint, "method=gptq"))
    both = run(small_run(checkpoint, "method=gptq", "calib.written=2"))
    assert (drawn.calibration["samples"], both.calibration["samples"]) == (4, 6)
    assert both.blocks[0]["error"] != drawn.blocks[0]["error"]


def test_a_method_that_needs_data_can_do_with_what_the_model_writes(
    checkpoint: Path, small_run: Callable[..., DictConfig]
) -> None:
    alone = ["calib.corpus=null", "calib.path=null", "calib.written=4"]
    assert run(small_run(checkpoint, "method=gptq", *alone)).calibration["samples"] == 4
    with pytest.raises(ConfigError, match=r"calib\.corpus=null.*calib=written"):
        parse(compose_run("method=gptq", "calib=none"))
