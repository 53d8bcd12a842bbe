"""Folding leaves the float function of a block as it was, under grouped-query attention too."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.models import load_small

from lsiq.models.folding import fold_scale, fold_shift, gather, spread


def test_fold_keeps_block_function(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    tokens = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(0))
    hidden, kwargs = model.embed(tokens, batch=2)
    block = model.block(0, kwargs)
    expected = block.with_weights({})(hidden)
    for group in block.spec.groups:
        generator = torch.Generator().manual_seed(1)
        channels = block.weights[f"{group.producer}.weight"].shape[0]
        scale = torch.rand(channels, generator=generator) * 3 + 0.3
        changed = fold_scale(block.weights, group, scale, block.head_dim)
        found = block.with_weights(changed)(hidden)
        assert torch.allclose(found, expected, atol=1e-4), group  # measured: 1e-6
        if f"{group.producer}.bias" in block.weights and group.kind == "norm":
            shift = torch.randn(channels, generator=generator)
            found = block.with_weights(fold_shift(block.weights, group, shift, block.head_dim))(hidden)
            assert torch.allclose(found, expected, atol=1e-4), group


def test_value_channels_are_repeated_for_their_query_heads() -> None:
    channels = torch.tensor([1.0, 2.0, 3.0, 4.0])  # two value heads of two channels, six query heads
    repeated = spread(channels, 12, head_dim=2)
    assert repeated.tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]
    assert gather(repeated, 4, head_dim=2).tolist() == channels.tolist()
