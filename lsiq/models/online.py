"""What a block's online rotations cost for each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lsiq.linalg.rotation import QUERY_KEY, Rotation

if TYPE_CHECKING:
    from lsiq.models.block import Block


def online_multiplications(block: Block, rotations: Mapping[str, Rotation]) -> int:
    """Return the multiply-adds of a block's rotations for one token."""
    spent = 0
    for place, rotation in rotations.items():
        heads = 1
        if place == QUERY_KEY:
            heads = sum(block.heads)
        spent += heads * rotation.multiplications
    return spent


def online_share(block: Block, rotations: Mapping[str, Rotation]) -> float:
    """Return the multiply-adds of a block's rotations over those of its linears, for one token."""
    return online_multiplications(block, rotations) / sum(
        block.weights[f"{name}.weight"].numel() for name in block.spec.linears
    )
