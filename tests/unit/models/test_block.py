"""A block is the transformers layer, as a pure function of its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.models import load_small
from transformers import AutoModelForCausalLM


def test_blocks_in_turn_give_the_hidden_states_of_the_plain_forward(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = torch.randint(0, 4096, (3, 40), generator=torch.Generator().manual_seed(0))
    hidden, kwargs = model.embed(tokens, batch=2)
    for index in range(model.depth):
        hidden = model.block(index, kwargs).with_weights({})(hidden)
    with torch.no_grad():
        expected = plain(tokens, use_cache=False).logits
    assert torch.allclose(model.logits(hidden), expected, atol=1e-5, rtol=1e-5)  # measured: 0.0


def test_a_block_holds_no_weights_and_running_it_leaves_no_trace(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    hidden, kwargs = model.embed(torch.zeros(1, 8, dtype=torch.long), batch=1)
    block = model.block(0, kwargs)
    before = {name: weight.clone() for name, weight in block.weights.items()}
    block.with_weights({name: torch.zeros_like(block.weights[name]) for name in block.linears})(hidden)
    assert all(parameter.is_meta for parameter in block.module.parameters())
    assert all(torch.equal(before[name], block.weights[name]) for name in before)


def test_gradients_flow_through_the_weights_of_a_block(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    hidden, kwargs = model.embed(torch.zeros(1, 8, dtype=torch.long), batch=1)
    block = model.block(1, kwargs)
    weights = {name: block.weights[name].clone().requires_grad_() for name in block.linears}
    block.with_weights(weights)(hidden).square().mean().backward()
    # Keys and queries get none when all tokens are alike and attention is uniform; everything else must.
    assert sum(weight.grad is not None and bool(weight.grad.abs().sum() > 0) for weight in weights.values()) >= 4


def test_every_linear_of_the_layer_is_listed(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    _, kwargs = model.embed(torch.zeros(1, 8, dtype=torch.long), batch=1)
    block = model.block(0, kwargs)
    linears = [f"{name}.weight" for name, m in block.module.named_modules() if isinstance(m, torch.nn.Linear)]
    assert sorted(block.linears) == sorted(linears)
