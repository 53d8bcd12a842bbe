"""Activation formats: the grid of each token, and where in a block it acts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from helpers.configuration import compose_run
from helpers.models import load_small
from torch import Tensor

from lsiq.errors import ConfigError
from lsiq.experiment.config import parse
from lsiq.formats.activation import Activation, rounded
from lsiq.models.attention import _attend_step_by_step
from lsiq.models.block import Block


@pytest.fixture
def block_and_stream(checkpoint: Path) -> tuple[Block, Tensor]:
    model = load_small(checkpoint)
    tokens = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(0))
    hidden, kwargs = model.embed(tokens, batch=2)
    return model.block(0, kwargs), hidden


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_each_token_is_rounded_within_a_step_of_its_own_range(bits: int, symmetric: bool) -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None]
    rounded = Activation(bits=bits, symmetric=symmetric).fake(x)
    reach = 2 * x.abs().amax(-1, keepdim=True) if symmetric else x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
    assert ((rounded - x).abs() <= 1.01 * reach / (2**bits - 2)).all()
    assert all(len(token.unique()) <= 2**bits for token in rounded.flatten(0, 1))


def test_per_tensor_has_one_range_and_loses_quiet_tokens() -> None:
    x = torch.tensor([[100.0, -100.0], [0.01, -0.01]])
    assert Activation(bits=4, per="tensor").fake(x)[1].abs().max() == 0
    assert Activation(bits=4, per="token").fake(x)[1].abs().max() > 0


@pytest.mark.parametrize("per", ["token", "tensor"])
@pytest.mark.parametrize("clip", [0.9, 0.5])
def test_a_clipped_range_is_the_share_of_both_its_ends(clip: float, per: Literal["token", "tensor"]) -> None:
    """Against QuaRot's formula: both ends times the ratio, zero included, then scale and zero point."""
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 1, -1, 5, -5])[:, None]
    dims = (-1,) if per == "token" else (0, 1, 2)
    low, high = x.amin(dims, keepdim=True).clamp(max=0) * clip, x.amax(dims, keepdim=True).clamp(min=0) * clip
    step = (high - low) / 15
    zero = (-low / step).round()
    expected = ((x / step).round() + zero).clamp(0, 15).sub(zero) * step
    assert torch.equal(Activation(bits=4, clip=clip, per=per).fake(x), expected)
    step = torch.maximum(-low, high) / 7
    expected = (x / step).round().clamp(-8, 7) * step
    assert torch.equal(Activation(bits=4, clip=clip, per=per, symmetric=True).fake(x), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_all_of_a_range_is_what_there_was_before_clipping(symmetric: bool) -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Activation(bits=4, symmetric=symmetric, clip=1).fake(x), rounded(x, (-1,), 4, symmetric))


def test_clipped_values_pass_no_gradient_but_through_the_scale() -> None:
    token = torch.tensor([[-2.0, -0.5, 0.25, 1.8, 1.9, 3.0]], requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    Activation(bits=4, clip=0.5).fake(token).backward(upstream)
    low, high = -1.0, 1.5  # the share that is kept; 1.8 and what lies beyond are clipped
    step, inside = (high - low) / 15, torch.tensor([[False, True, True, False, False, False]])
    codes, zero = (token.detach() / step).round(), round(-low / step)
    clamped = (codes + zero).clamp(0, 15) - zero
    # d(scale · code) / d(scale), with the codes of kept values following scale and value straight through, and the zero
    # point, low / scale, doing so where a value is clipped.
    of_zero = torch.where(inside, 0.0, 1.0)
    to_step = (upstream * (clamped - torch.where(inside, token.detach() / step, 0.0))).sum()
    to_step = to_step + (upstream * of_zero * (-1) * (low / step)).sum()
    to_low = (upstream * of_zero).sum() - to_step / 15
    to_high = to_step / 15
    expected = torch.where(inside, upstream, 0.0)
    expected[0, 0] += 0.5 * to_low
    expected[0, 5] += 0.5 * to_high
    assert token.grad is not None
    assert relative_error(token.grad, expected) < 1e-6
    assert (token.grad[0, 3:5] == 0).all()


def test_names_and_words_say_what_is_clipped() -> None:
    assert Activation(bits=4).suffix == ""
    assert Activation(bits=4, clip=0.9).suffix == "clip0.9"
    assert Activation(bits=4, clip=0.9).words.endswith("ranges found while it runs, 0.9 of each kept")
    for override, name in (("0.9", "w4a4-aclip0.9"), ("1", "w4a4")):
        assert parse(compose_run("quant=w4a4", f"quant.activation.clip={override}")).quant.name == name
    mixed = parse(compose_run("quant=w4a4", "quant.activation.clip=0.9", "quant.allocate.bits=3", "method=gptq"))
    assert mixed.quant.name == "mixed3a4-aclip0.9"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["quant=w4a4", "quant.activation.clip=0"], r"quant.activation.clip=0: .*greater than 0; expected: share of"),
        (["quant=w4a4", "quant.activation.clip=1.1"], r"clip=1.1: .*less than or equal to 1; expected: share of each"),
        (["quant=w4a4", "quant.activation.clip=null"], "quant.activation.clip=null: .*expected: share of each range"),
        (["quant=w4a16", "quant.activation.clip=0.9"], "quant.activation.clip=0.9: float activations have no range"),
    ],
)
def test_shares_that_mean_nothing_are_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse(compose_run(*overrides))
    assert "\n" not in str(caught.value)


def test_dead_tokens_stay_zero_and_gradients_pass() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    rounded = Activation(bits=4).fake(x)
    rounded.sum().backward()
    assert torch.equal(rounded, torch.zeros(2, 8))
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_half_precision_tokens_keep_their_scale() -> None:
    x = (torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 1e-4).half()
    assert relative_error(Activation(bits=8).fake(x).float(), x.float()) < 0.01


def test_fewer_bits_hurt_a_block_more(block_and_stream: tuple[Block, Tensor]) -> None:
    block, hidden = block_and_stream
    expected = block.with_weights({})(hidden)
    errors = [relative_error(block.with_weights({}, Activation(bits=b))(hidden), expected) for b in (4, 6, 8)]
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[2] < 0.02  # measured: 0.016 (llama), 0.010 (opt)
    assert torch.equal(block.with_weights({}, Activation(bits=16))(hidden), expected)


def test_queries_keys_and_values_are_quantised_unless_told_otherwise(block_and_stream: tuple[Block, Tensor]) -> None:
    block, hidden = block_and_stream
    with_attention = block.with_weights({}, Activation(bits=4))(hidden)
    without = block.with_weights({}, Activation(bits=4, attention=False))(hidden)
    assert not torch.equal(with_attention, without)


def test_the_softmax_output_is_quantised_only_on_request(block_and_stream: tuple[Block, Tensor]) -> None:
    block, hidden = block_and_stream
    without = block.with_weights({}, Activation(bits=8, attention=False))(hidden)
    within = block.with_weights({}, Activation(bits=8, attention=False, softmax=True))(hidden)
    assert 0 < relative_error(within, without) < 0.05  # measured: 0.023 (llama), 0.013 (opt)


def test_attention_with_a_fine_softmax_grid_is_plain_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 16, 8, generator=generator)
    key, value = (torch.randn(2, 2, 16, 8, generator=generator) for _ in range(2))  # grouped-query attention
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    found = _attend_step_by_step(query, key, value, None, None, None, Activation(bits=16))
    assert relative_error(found.transpose(1, 2), plain) < 1e-3  # measured: 2e-5


def test_nothing_is_left_behind_after_a_run(block_and_stream: tuple[Block, Tensor]) -> None:
    block, hidden = block_and_stream
    expected = block.with_weights({})(hidden)
    block.with_weights({}, Activation(bits=4, softmax=True))(hidden)
    assert torch.equal(block.with_weights({})(hidden), expected)
    assert not any(module._forward_pre_hooks for module in block.module.modules())
