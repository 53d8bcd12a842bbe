"""Bits are shared out exactly, by sensitivities that are what they say."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import load_small

from lsiq.allocation.divergence import divergences, passes
from lsiq.allocation.fisher import estimated_divergences
from lsiq.allocation.solve import choose
from lsiq.allocation.units import units_of
from lsiq.data.tokens import random_windows
from lsiq.evals.block_pass import run_blocks
from lsiq.evals.perplexity import score_tokens
from lsiq.formats.integer import Integer
from lsiq.formats.tensor import quantize
from lsiq.models.families.llama import LLAMA
from lsiq.models.loading import Model

CHOICES = [Integer(bits=2, group=32), Integer(bits=4, group=32)]


@pytest.fixture(scope="module")
def model(checkpoints: dict[str, Path]) -> Model:
    return load_small(checkpoints["llama"])


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    random = np.random.default_rng(seed)
    sensitivities, bits = random.lognormal(-4, 3, (6, 3)), random.integers(1, 10**6, (6, 3))
    allowed = int(bits.mean(1).sum())
    found = choose(sensitivities.tolist(), bits.tolist(), allowed)
    rows = np.arange(6)
    every = [list(one) for one in itertools.product(range(3), repeat=6)]
    fits = [one for one in every if bits[rows, one].sum() <= allowed]
    assert bits[rows, found].sum() <= allowed
    best = min(sensitivities[rows, one].sum() for one in fits)
    assert sensitivities[rows, found].sum() == pytest.approx(best, rel=1e-6)


def test_a_limit_that_is_met_exactly_is_met() -> None:
    assert choose([[1.0, 0.5], [1.0, 0.1]], [[2_000_001, 3_000_001], [2, 1_000_002]], 3_000_003) == [0, 1]


def test_units_cover_every_linear_once() -> None:
    for kind, count in (("linear", 14), ("stage", 8), ("block", 2)):
        units = units_of(LLAMA, 2, kind)
        assert len(units) == count
        named = [f"{unit.block}.{name}" for unit in units for name in unit.linears]
        assert sorted(named) == sorted(f"{index}.{name}" for index in range(2) for name in LLAMA.linears)


def test_a_sensitivity_is_the_divergence_of_the_model_with_that_unit_rounded(model: Model) -> None:
    tokens = random_windows(model.config.vocab_size, 3, 16, 0)
    units = units_of(model.spec, model.depth, "linear")
    found = divergences(model, tokens, units, CHOICES, 2, 2**24, lambda: None)
    assert found.shape == (14, 2)
    row, unit = next((row, unit) for row, unit in enumerate(units) if unit.name == "1.mlp.up_proj")

    def tried(block):  # type: ignore[no-untyped-def]
        name = "mlp.up_proj.weight"
        own = {name: quantize(block.weights[name], CHOICES[0], name).decode()} if block.index == unit.block else {}
        return block.with_weights(own)

    batches = tokens.split(2)
    functions = {"float": lambda block: block.with_weights({}), "tried": tried}
    left = run_blocks(model, dict.fromkeys(functions, batches), functions, lambda: None)
    expected = score_tokens(model, batches, left, "float")["tried"].divergence
    assert expected is not None
    assert found[row, 0].item() == pytest.approx(expected.double().mean().item(), rel=1e-4)
    assert (found[:, 0] > found[:, 1]).all(), "two bits move predictions further than four"


def test_sensitivities_do_not_depend_on_how_many_trials_fit_at_once(model: Model) -> None:
    tokens = random_windows(model.config.vocab_size, 2, 8, 0)
    units = units_of(model.spec, model.depth, "stage")
    one = tokens.numel() * model.config.hidden_size * 4
    together = divergences(model, tokens, units, CHOICES, 2, 2**24, lambda: None)
    blocks: list[int] = []
    apart = divergences(model, tokens, units, CHOICES, 2, 7 * one, lambda: blocks.append(1))
    assert torch.equal(together, apart)
    assert passes(model, tokens, len(units), 2, 7 * one) * model.depth == len(blocks) == 8


def test_the_estimate_agrees_with_small_divergences(model: Model) -> None:
    """With eight bits, where the divergence is of second order: its standard error is about √(2/48) = 0.2."""
    tokens = random_windows(model.config.vocab_size, 48, 12, 0)
    units, fine = units_of(model.spec, model.depth, "block"), [Integer(bits=7, group=32)]
    measured = divergences(model, tokens, units, fine, 8, 2**26, lambda: None)
    generator = torch.Generator().manual_seed(0)
    estimated = estimated_divergences(model, tokens, units, fine, generator, lambda: None)
    ratio = (estimated / measured).flatten()
    assert (ratio > 0.4).all(), ratio  # measured: see below
    assert (ratio < 2.0).all(), ratio
