"""What every part must keep, on both families; a new file under conf/method/part/ is tested here for free."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.configuration import CONF
from helpers.learned import PARTS, W2, W4A4, moved, setting
from omegaconf import OmegaConf
from torch import Tensor

from lsiq.formats.fp8 import FP8, FP8Activation
from lsiq.formats.mxint import MXActivation, MXInt
from lsiq.formats.nvfp4 import NVFP4, NVFP4Activation
from lsiq.formats.quant import QuantSettings
from lsiq.learning.encode import merge
from lsiq.learning.trained import apply_parts, start_parts
from lsiq.models.block import Block
from lsiq.parts.base import Draft, Part, PartState, rate_of, rounded
from lsiq.parts.equivalent import Equivalent
from lsiq.settings import build

# What the files leave to the method.
OPEN = {"lr": 1e-3, "corner": 4}
MX = QuantSettings(weight=MXInt(bits=4), activation=MXActivation(bits=8))
FP4 = QuantSettings(weight=NVFP4(), activation=NVFP4Activation())
FP8_TENSOR = QuantSettings(weight=FP8(per="tensor"), activation=FP8Activation())


def part_of(name: str) -> Part:
    node: Any = OmegaConf.to_container(OmegaConf.load(CONF / "method" / "part" / f"{name}.yaml"))
    return build({key: OPEN[key] if value == "???" else value for key, value in node.items()})


FILES = {file.stem: part_of(file.stem) for file in sorted((CONF / "method" / "part").glob("*.yaml"))}
every_part = pytest.mark.parametrize("part", FILES.values(), ids=FILES)


def tensors_of(state: PartState) -> dict[str, Tensor]:
    return {**state.parameters, **state.constants}


def weights_used(part: Part, state: PartState, block: Block, quant: QuantSettings) -> dict[str, Tensor]:
    return rounded(apply_parts((part,), (state,), block), block.linears, quant)


@every_part
def test_is_a_part_and_says_so(part: Part) -> None:
    assert isinstance(part, Part)
    assert part.name.isidentifier()
    assert rate_of(part, PartState({}), steps=10) > 0


@every_part
def test_the_same_seed_starts_alike(checkpoint: Path, part: Part) -> None:
    first, second = (tensors_of(part.start(block, W4A4, context)) for block, context in map(setting, [checkpoint] * 2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@every_part
def test_bounds_and_bulk_are_those_of_parameters(checkpoint: Path, part: Part) -> None:
    block, context = setting(checkpoint)
    state = part.start(block, W4A4, context)
    assert state.parameters
    assert set(state.bounds) <= set(state.parameters)
    assert state.bulky <= set(state.parameters)
    for name, (low, high) in state.bounds.items():
        assert low <= state.parameters[name].min()
        assert state.parameters[name].max() <= high


@every_part
def test_a_part_that_changes_the_function_starts_where_the_block_is(checkpoint: Path, part: Part) -> None:
    block, context = setting(checkpoint)
    draft = apply_parts((part,), [part.start(block, W4A4, context)], block)
    if part.keeps_function:  # may start anywhere
        expected = block.with_weights({})(context.inputs)
        found = block.with_weights(draft.weights)(context.inputs)
        assert torch.allclose(found, expected, atol=1e-4)  # measured: 2e-6
    else:
        assert all(torch.equal(draft.weights[name], weight) for name, weight in block.weights.items())


@every_part
def test_applying_is_pure(checkpoint: Path, part: Part) -> None:
    block, context = setting(checkpoint)
    (state,) = moved([part.start(block, W4A4, context)])
    draft = Draft(block.weights)
    before, weights = copy.deepcopy(tensors_of(state)), copy.deepcopy(dict(block.weights))
    first, second = part.apply(draft, state, block), part.apply(draft, state, block)
    assert first is not draft
    assert (draft.weights is block.weights, draft.clip, draft.extremes, draft.offsets) == (True, {}, {}, {})
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors_of(state).items())
    assert all(torch.equal(weights[key], tensor) for key, tensor in block.weights.items())
    assert all(torch.equal(tensor, second.weights[key]) for key, tensor in first.weights.items())


@every_part
def test_gradients_reach_every_parameter(checkpoint: Path, part: Part) -> None:
    block, context = setting(checkpoint)
    (state,) = moved([part.start(block, W4A4, context)])
    for parameter in state.parameters.values():
        parameter.requires_grad_()
    weights = weights_used(part, state, block, W4A4)
    (block.with_weights(weights)(context.inputs) - context.targets).square().mean().backward()
    for name, parameter in state.parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@every_part
@pytest.mark.parametrize("quant", [W2, W4A4, MX, FP4, FP8_TENSOR], ids=["w2", "w4a4", "mx", "fp4", "fp8"])
def test_what_is_trained_is_what_is_stored(checkpoint: Path, part: Part, quant: QuantSettings) -> None:
    block, context = setting(checkpoint)
    states = moved(start_parts((part,), block, quant, context))
    trained = weights_used(part, states[0], block, quant)
    result = merge(apply_parts((part,), states, block), block, quant)
    for name in block.linears:
        assert torch.equal(result.weights[name].decode(), trained[name]), name
    assert all(torch.equal(tensor, trained[name]) for name, tensor in result.floats.items())
    assert set(result.floats) <= set(block.weights) - set(block.linears)


@every_part
def test_a_part_that_moved_does_what_it_says(checkpoint: Path, part: Part) -> None:
    block, context = setting(checkpoint)
    (state,) = moved([part.start(block, W4A4, context)], size=0.3)
    draft = part.apply(Draft(block.weights), state, block)
    assert bool(draft.offsets) == part.chooses_codes
    same = all(torch.equal(draft.weights[name], weight) for name, weight in block.weights.items())
    if part.keeps_function:
        expected = block.with_weights({})(context.inputs)
        found = block.with_weights(draft.weights)(context.inputs)
        assert torch.allclose(found, expected, atol=1e-4)  # measured: 2e-6
        assert not same
    else:  # of the weights, of the grid or of the codes
        assert not same or draft.clip or draft.extremes or draft.offsets


STILL = ("singular-corner", "clip", "band", "rounding", "dense")


@pytest.mark.parametrize("quant", [W2, W4A4, FP4], ids=["w2", "w4a4", "fp4"])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_trained_path_merged_path_and_decoded_codes_are_equal(
    checkpoint: Path, parts: tuple[Part, ...], quant: QuantSettings
) -> None:
    block, context = setting(checkpoint)
    states = moved(start_parts(parts, block, quant, context))
    trained = rounded(apply_parts(parts, states, block), block.linears, quant)
    result = merge(apply_parts(parts, states, block), block, quant)
    for name in block.linears:
        assert torch.equal(result.weights[name].decode(), trained[name]), name
    for name, tensor in result.floats.items():
        assert torch.equal(tensor, trained[name]), name
    assert torch.equal(
        block.with_weights(trained, quant.activation)(context.inputs),
        block.with_result(result, quant.activation)(context.inputs),
    )


@pytest.mark.parametrize("parts", [PARTS[n] for n in STILL], ids=STILL)
def test_parts_start_where_the_block_is(checkpoint: Path, parts: tuple[Part, ...]) -> None:
    block, context = setting(checkpoint)
    draft = apply_parts(parts, [part.start(block, W2, context) for part in parts], block)
    assert all(torch.equal(draft.weights[name], weight) for name, weight in block.weights.items())


@pytest.mark.parametrize("shift", ["always", "never"])
def test_equivalent_keeps_the_float_function(checkpoint: Path, shift: str) -> None:
    block, context = setting(checkpoint)
    part = Equivalent(shift=shift, weight_only_families=None)
    (state,) = moved([part.start(block, W2, context)], size=0.3)
    assert any("query_key" in name for name in state.parameters)
    assert any("v_proj" in name for name in state.parameters)
    draft = part.apply(apply_parts((), (), block), state, block)
    expected = block.with_weights({})(context.inputs)
    assert torch.allclose(block.with_weights(draft.weights)(context.inputs), expected, atol=1e-4)  # measured: 2e-6
    assert any(not torch.equal(draft.weights[name], block.weights[name]) for name in block.linears)


@pytest.mark.parametrize("name", ["clip", "equivalent", "singular-corner", "all", "band"])
def test_gradients_equal_float64_finite_differences(checkpoint: Path, name: str) -> None:
    """Of everything but the rounding, whose gradient is a convention: on a grid of 16 bits that does not round."""
    block, context = setting(checkpoint, samples=2)
    block = replace(block, weights={n: w.double() for n, w in block.weights.items()}, dtype=torch.float64)
    block = replace(
        block,
        kwargs={k: tuple(t.double() for t in v) if isinstance(v, tuple) else v for k, v in block.kwargs.items()},
    )
    context = replace(context, inputs=context.inputs.double(), targets=context.targets.double())
    parts = PARTS[name]
    states = moved([part.start(block, W2, context) for part in parts])
    states = [
        PartState(
            {k: p.double().requires_grad_() for k, p in s.parameters.items()},
            {k: c.double() for k, c in s.constants.items()},
        )
        for s in states
    ]

    def loss() -> Tensor:
        draft = apply_parts(parts, states, block)
        weights = dict(draft.weights)
        for linear, (low, high) in draft.clip.items():  # the smooth part of clipping: the range itself
            lo, hi = W2.weight.extremes(weights[linear])
            weights[linear] = weights[linear] * 1.0 + 0.01 * (high * hi - low * lo).mean()
        return (block.with_weights(weights)(context.inputs) - context.targets).square().mean()

    loss().backward()
    generator = torch.Generator().manual_seed(6)
    for state in states:
        for key, parameter in state.parameters.items():
            direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            # The RMSNorm of transformers computes in float32 whatever it is given: a longer step, a wider tolerance.
            step, tolerance, least = (1e-5, 1e-5, 1e-6) if block.spec.model_type == "opt" else (1e-2, 2e-2, 5e-5)
            with torch.no_grad():
                parameter += step * direction
                above = loss()
                parameter -= 2 * step * direction
                below = loss()
                parameter += step * direction
            numeric = ((above - below) / (2 * step)).item()
            analytic = (parameter.grad * direction).sum().item()
            assert analytic == pytest.approx(numeric, rel=tolerance, abs=least), key
