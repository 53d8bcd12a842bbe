"""Scales of an FP8 cache are those under which the largest key and value of the calibration tokens just fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.models import SHAPES, load_small
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from lsiq.calib.cache_range import measure_scales, with_float_scales
from lsiq.data.tokens import random_windows
from lsiq.errors import NumericalError
from lsiq.formats.activation import Activation
from lsiq.formats.cache_scales import CacheScales
from lsiq.formats.key_value import KeyValue
from lsiq.models.result import BlockResult

FP8 = KeyValue(format="fp8", scale="calibrated")


def cached(checkpoint: Path, tokens: Tensor) -> DynamicCache:
    """What transformers appends to its cache."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens, use_cache=True).past_key_values


@pytest.mark.parametrize("family", sorted(SHAPES))
@pytest.mark.parametrize("prefix", [0, 3])
def test_the_scales_of_the_float_model_are_those_of_transformers_cache(
    family: str, prefix: int, checkpoints: dict[str, Path]
) -> None:
    model = load_small(checkpoints[family])
    tokens = random_windows(model.config.vocab_size, 5, 24, 0)
    before = random_windows(model.config.vocab_size, 1, prefix, 1) if prefix else tokens[:1, :0]
    prepared = model.with_prefix(before[0]) if prefix else model
    theirs = cached(checkpoints[family], torch.cat([before.expand(5, -1), tokens], 1))
    scales = with_float_scales(prepared, FP8, tokens, batch=2).cache_scales
    assert scales is not None
    assert scales == with_float_scales(prepared, FP8, tokens, batch=5).cache_scales
    for found, layer in zip(scales, theirs.layers, strict=True):
        largest = [x[:, :, prefix:].abs().max().item() for x in (layer.keys, layer.values)]
        assert [found.key * 448, found.value * 448] == pytest.approx(largest, rel=1e-5)  # measured: 5e-7
        assert found == CacheScales.of(found.tensor()), "numbers of float32"


def test_what_is_not_calibrated_has_none(checkpoints: dict[str, Path]) -> None:
    model = load_small(checkpoints["llama"])
    assert with_float_scales(model, KeyValue(format="fp8", scale=1.0), None, batch=2) is model


def test_a_block_that_a_method_changed_is_measured_as_it_is_then(checkpoints: dict[str, Path]) -> None:
    model = load_small(checkpoints["llama"])
    hidden, kwargs = model.embed(random_windows(model.config.vocab_size, 2, 16, 0), 2)
    block = model.block(0, kwargs)
    before = measure_scales(block, BlockResult({}), hidden, 2, Activation(), FP8)
    name = "self_attn.k_proj.weight"
    doubled = BlockResult({}, {name: 2 * block.weights[name]})
    after = measure_scales(block, doubled, hidden, 2, Activation(), FP8)
    assert after.key == pytest.approx(2 * before.key, rel=1e-6)
    assert after.value == before.value
    narrow = measure_scales(block, BlockResult({}), hidden, 2, Activation(bits=4), FP8)
    assert narrow != before, "inputs are rounded as they will be"


def test_keys_that_are_not_finite_are_named(checkpoints: dict[str, Path]) -> None:
    model = load_small(checkpoints["llama"])
    hidden, kwargs = model.embed(random_windows(model.config.vocab_size, 2, 16, 0), 2)
    block = model.block(1, kwargs)
    name = "self_attn.v_proj.weight"
    broken = replace(block, weights={**block.weights, name: block.weights[name] * float("inf")})
    with pytest.raises(NumericalError, match="block 1: its keys or values are not finite"):
        measure_scales(broken, BlockResult({}), hidden, 2, Activation(), FP8)
