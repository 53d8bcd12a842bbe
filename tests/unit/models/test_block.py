"""A block is the transformers layer, as a pure function of its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.models import load_small


def test_a_block_holds_no_weights_and_running_it_leaves_no_trace(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    hidden, kwargs = model.embed(torch.zeros(1, 8, dtype=torch.long), batch=1)
    block = model.block(0, kwargs)
    before = {name: weight.clone() for name, weight in block.weights.items()}
    block.with_weights({name: torch.zeros_like(block.weights[name]) for name in block.linears})(hidden)
    assert all(parameter.is_meta for parameter in block.module.parameters())
    assert all(torch.equal(before[name], block.weights[name]) for name in before)
