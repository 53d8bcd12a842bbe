"""The blocks of the float model while others are quantised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.learned import W2
from helpers.models import load_small
from torch import Tensor

from lsiq.models.checkpoint import Checkpoint
from lsiq.pipeline.block_loop import _Blocks


class Counted:
    """A checkpoint that counts what is read of it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.reads = checkpoint, 0

    def read(self, name: str, shape: torch.Size) -> Tensor:
        self.reads += 1
        return self.checkpoint.read(name, shape)

    def check_unchanged(self) -> None:
        self.checkpoint.check_unchanged()


@pytest.mark.parametrize("keeps", [True, False])
def test_blocks_that_are_kept_are_read_once(checkpoint: Path, keeps: bool) -> None:
    model = load_small(checkpoint)
    counted = Counted(model.checkpoint)
    model = replace(model, checkpoint=counted)
    _, kwargs = model.embed(torch.zeros(1, 4, dtype=torch.long), batch=1)
    blocks = _Blocks(model, kwargs, W2, {} if keeps else None)
    first = blocks(1)
    tensors = counted.reads
    assert tensors == len(first.weights)
    again = blocks(1)
    assert counted.reads == (tensors if keeps else 2 * tensors)
    assert all(torch.equal(weight, again.weights[name]) for name, weight in first.weights.items())
    assert blocks.turn_to(0).index == 0
    assert blocks(0) is blocks.at_hand
