"""AWQ leaves the float function alone, chooses by output error, and hands on to any rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers.configuration import compose_run
from helpers.models import SHAPES, load_small, save_model
from torch import Tensor

from lsiq.calib.scale_search import candidate_scale, observe_inputs, rounded_weight, search_clip
from lsiq.errors import ConfigError, InputError
from lsiq.experiment.config import parse
from lsiq.formats.activation import Activation
from lsiq.formats.integer import Integer
from lsiq.formats.quant import QuantSettings
from lsiq.formats.tensor import quantize
from lsiq.methods.awq import AWQ
from lsiq.methods.base import Method
from lsiq.methods.gptq import GPTQ
from lsiq.methods.rtn import RTN
from lsiq.models.block import Block
from lsiq.models.context import Context
from lsiq.models.folding import fold_scale

SEARCHES: list[Literal["linear", "block"]] = ["linear", "block"]


def loud_block(checkpoint: Path) -> tuple[Block, Tensor]:
    """A block whose linears read a few channels of ten times the others' size, and a stream for it."""
    model = load_small(checkpoint)
    tokens = torch.randint(0, 4096, (8, 48), generator=torch.Generator().manual_seed(2))
    hidden, kwargs = model.embed(tokens, batch=4)
    block = model.block(0, kwargs)
    weights = dict(block.weights)
    for group in block.spec.groups:
        channels = len(weights[f"{group.producer}.weight"])
        loud = torch.ones(channels)
        loud[torch.randperm(channels, generator=torch.Generator().manual_seed(4))[:4]] = 0.1
        folded = fold_scale(weights, group, loud, block.head_dim)
        weights |= {name: tensor for name, tensor in folded.items() if name.startswith(f"{group.producer}.")}
    return replace(block, weights=weights), hidden


def formats(bits: int, group: int | None = 32) -> QuantSettings:
    return QuantSettings(weight=Integer(bits=bits, group=group), activation=Activation())


def context_of(hidden: Tensor, batch: int = 4) -> Context:
    return Context(hidden, None, torch.Generator().manual_seed(0), batch, lambda values: None)


@torch.no_grad()
def block_error(method: Method, block: Block, hidden: Tensor, quant: QuantSettings) -> float:
    result = method.quantize_block(block, quant, context_of(hidden))
    return (block.with_result(result)(hidden) - block.with_weights({})(hidden)).square().sum().item()


@pytest.mark.parametrize("search", SEARCHES)
def test_scaling_keeps_the_float_function(checkpoint: Path, search: Literal["linear", "block"]) -> None:
    block, hidden = loud_block(checkpoint)  # the llama has three query heads to a value head
    changes = AWQ(search=search, clip=False).transform(block, formats(3), context_of(hidden))
    changed, ratios = changes.folded, changes.metrics
    assert any(ratio > 0 for ratio in ratios.values())
    expected, found = block.with_weights({})(hidden), block.with_weights(changed)(hidden)
    assert torch.allclose(found, expected, atol=1e-4)  # measured: 4.2e-5


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("search", SEARCHES)
def test_block_error_is_below_that_of_rounding_to_nearest(
    checkpoint: Path, bits: int, search: Literal["linear", "block"]
) -> None:
    block, hidden = loud_block(checkpoint)
    found = block_error(AWQ(search=search), block, hidden, formats(bits))
    assert found < block_error(RTN(), block, hidden, formats(bits))  # measured: 0.13 to 0.40 of it


def test_scale_is_the_mean_magnitude_to_the_ratio(checkpoint: Path) -> None:
    block, hidden = loud_block(checkpoint)
    statistics = observe_inputs(block, hidden, batch=3)
    group = block.spec.groups[0]
    shown: list[Tensor] = []
    module = block.module.get_submodule(group.consumers[0])
    handle = module.register_forward_hook(lambda module, args, out: shown.append(args[0]))
    block.with_weights({})(hidden)
    handle.remove()
    power = shown[0].abs().mean((0, 1)) ** 0.4
    expected = power / (power.max() * power.min()) ** 0.5
    found = candidate_scale(block, group, statistics[group.consumers[0]], 0.4)
    assert torch.allclose(found, expected, rtol=1e-5)  # measured: 1.1e-7


def test_clipping_of_each_group_is_the_best_of_those_tried() -> None:
    generator = torch.Generator().manual_seed(1)
    w, fmt = torch.randn(6, 32, generator=generator), Integer(bits=2, group=16)
    x = torch.randn(200, 32, generator=generator)
    found = search_clip(w, x.t() @ x, fmt, steps=20, shrink=0.5)
    for row in range(6):
        for part in (slice(0, 16), slice(16, 32)):
            weights = w[row : row + 1, part]
            errors = {}
            for step in range(20):
                bound = weights.abs().max() * (1 - 0.5 * step / 20)
                clamped = weights.clamp(-bound, bound)
                errors[step] = (
                    ((rounded_weight(clamped, fmt) - weights) @ x[:, part].t()).square().sum().item(),
                    bound,
                )
            best = min(errors.values())[1]
            assert torch.equal(found[row : row + 1, part], weights.clamp(-best, best))
    assert not torch.equal(found, w)


def test_query_and_key_are_not_clipped(checkpoint: Path) -> None:
    block, hidden = loud_block(checkpoint)
    changes = AWQ().transform(block, formats(2), context_of(hidden))
    folded, clipped = changes.folded, changes.clipped
    assert all(not torch.equal(clipped[name], folded.get(name, block.weights[name])) for name in clipped)
    assert set(clipped) == set(block.linears) - {"self_attn.q_proj.weight", "self_attn.k_proj.weight"}


def test_then_rounds_the_prepared_block(checkpoint: Path) -> None:
    block, hidden = loud_block(checkpoint)
    changes = AWQ().transform(block, formats(3), context_of(hidden))
    folded, clipped = changes.folded, changes.clipped
    prepared = replace(block, weights={**block.weights, **folded, **clipped})
    for then in (RTN(), GPTQ()):
        expected = then.quantize_block(prepared, formats(3), context_of(hidden))
        found = AWQ(then=then).quantize_block(block, formats(3), context_of(hidden))
        for name in block.linears:
            assert torch.equal(found.weights[name].codes, expected.weights[name].codes), name
        assert set(found.floats) == {name for name in folded if name not in block.linears}
    nearest = AWQ().quantize_block(block, formats(3), context_of(hidden))
    assert all(
        torch.equal(nearest.weights[n].codes, quantize(prepared.weights[n], formats(3).weight).codes)
        for n in block.linears
    )


def test_choices_do_not_depend_on_how_the_stream_is_batched(checkpoint: Path) -> None:
    block, hidden = loud_block(checkpoint)
    one = AWQ().transform(block, formats(3), context_of(hidden, batch=1)).metrics
    all_at_once = AWQ().transform(block, formats(3), context_of(hidden, batch=8)).metrics
    assert one == all_at_once


def test_a_composite_is_called_after_its_parts() -> None:
    assert AWQ().name == "awq"
    assert AWQ(then=GPTQ()).name == "awq+gptq"
    assert parse(compose_run("method=awq", "method@method.then=gptq", "method.then.damping=0.05")).method == AWQ(
        then=GPTQ(damping=0.05)
    )


def test_a_then_that_is_no_method_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.then=.*expected: the method that rounds"):
        parse(compose_run("method=awq", "method.then._target_=lsiq.formats.integer.Integer", "+method.then.bits=3"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"do_layer_norm_before": False}, "post-norm"), ({"layer_norm_elementwise_affine": False}, "no weights to fold")],
)
def test_models_that_cannot_be_folded_are_refused_with_the_reason(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    model = load_small(save_model({**SHAPES["opt"], **change}, tmp_path / "opt"))
    hidden, kwargs = model.embed(torch.zeros(1, 8, dtype=torch.long), batch=1)
    with pytest.raises(InputError, match=f"method awq does not fit this opt model: .*{reason}"):
        AWQ().quantize_block(model.block(0, kwargs), formats(3), context_of(hidden))
