"""Activation formats: the grid of each token, and where in a block it acts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import load_small
from torch import Tensor

from lsiq.formats.activation import Activation
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
