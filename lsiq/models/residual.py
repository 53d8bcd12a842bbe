"""Turning the residual stream of a model: every block computes what it did, in other coordinates.

With `Q` orthogonal, the stream becomes `h Q`. What writes to it, writes rotated: `W → Qᵀ W`. What reads it through a
norm, reads rotated: the norm's weight and bias move into the linears behind it, and the bare norm commutes with `Q`:
RMSNorm always, LayerNorm where `Q` keeps the all-ones direction, along which it subtracts the mean.

Source: QuaRot (arXiv 2404.00456, section 4.1).
Deviation: QuaRot rotates LayerNorm models after SliceGPT's change to RMSNorm; keeping the mean's direction leaves the
layer as it is. Embeddings and head are not changed: the stream is rotated once where it enters the first block and
rotated back where it leaves the last, 2 d² multiply-adds per token in place of two tables that could no longer be tied.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lsiq.errors import InputError
from lsiq.linalg.hadamard import random_hadamard
from lsiq.models.spec import ModelSpec


def residual_rotation(width: int, keep_mean: bool, generator: torch.Generator, block: int | None = None) -> Tensor:
    """Return a random Hadamard rotation `(d, d)` in float32 for the residual stream.

    Args:
        keep_mean: whether the model's norms subtract the mean.
        block: rotates each run of so many channels by itself; None rotates all.
    """
    return random_hadamard(width, generator, block, keep_mean).float()


def rotate_block(weights: Mapping[str, Tensor], spec: ModelSpec, rotation: Tensor) -> dict[str, Tensor]:
    """Return all tensors of a block for a residual stream that is `h Q` instead of `h`.

    Args:
        weights: the block's float32 tensors by dotted name.
        rotation: `Q (d, d)` on their device.

    Raises:
        InputError: a norm has a bias that its readers have no bias to take up.
    """
    rotated = dict(weights)
    for group in spec.groups:
        if group.kind != "norm":
            continue
        norm, shift = weights[f"{group.producer}.weight"], weights.get(f"{group.producer}.bias")
        gain = norm + group.offset if group.offset else norm
        rotated[f"{group.producer}.weight"] = torch.full_like(norm, 1 - group.offset)
        if shift is not None:
            rotated[f"{group.producer}.bias"] = torch.zeros_like(shift)
        for name in group.consumers:
            weight = weights[f"{name}.weight"]
            rotated[f"{name}.weight"] = (weight * gain) @ rotation
            if shift is not None:
                if (bias := weights.get(f"{name}.bias")) is None:
                    raise InputError(f"{group.producer} has a bias and {name} has none: the stream cannot be rotated")
                rotated[f"{name}.bias"] = bias + weight @ shift
    for name in spec.writers:
        rotated[f"{name}.weight"] = rotation.t() @ weights[f"{name}.weight"]
        if (bias := weights.get(f"{name}.bias")) is not None:
            rotated[f"{name}.bias"] = bias @ rotation
    return rotated
