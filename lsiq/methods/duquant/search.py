"""The search behind DuQuant: rotations within blocks of channels and a permutation between them."""

from __future__ import annotations

import torch
from torch import Tensor

from lsiq.linalg.hadamard import random_orthogonal
from lsiq.linalg.rotation import Rotation, RotationStage


def find_rotation(x: Tensor, block: int, steps: int, permutations: int, generator: torch.Generator) -> Rotation:
    """Return a rotation that makes the largest |entries| of `x (tokens, n)` small.

    Args:
        block: channels rotated together at most; the largest divisor of `n` up to this is taken.
        steps: of each greedy search.
        permutations: how often a zigzag permutation and a further rotation follow the first rotation.
    """
    n = x.shape[1]
    width = max((size for size in range(2, min(block, n) + 1) if n % size == 0), default=n)
    order = torch.arange(n, device=x.device)
    stages: list[RotationStage] = []
    for step in range(permutations + 1):
        if step:
            order = zigzag(x.abs().amax(0), width)
        blocks = greedy_blocks(x[:, order].unflatten(1, (-1, width)), steps, generator)
        stage = RotationStage(order, x.new_ones(n), blocks)
        stages.append(stage)
        x = stage.apply(x)
    return Rotation(tuple(stages))


def zigzag(size: Tensor, width: int) -> Tensor:
    """Return `(n,)` where each channel comes from, so that blocks of `width` hold alike outliers.

    Channels by falling `size (n,)` are dealt to the blocks 1 … K, then K … 1, and so on.
    """
    rounds = size.argsort(descending=True, stable=True).view(width, -1)
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.t().flatten()


def greedy_blocks(x: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Return an orthogonal matrix `(K, width, width)` for each block of `x (tokens, K, width)`.

    Each step swaps the channel of the largest |entry| to the front and multiplies by one rotation whose first row is
    even, so that what stood there is spread over the block. The product up to the best step is returned; none at all
    is among what is compared.
    """
    count, width = x.shape[1:]
    current = x.transpose(0, 1).contiguous()  # (K, tokens, width)
    product = torch.eye(width, device=x.device, dtype=x.dtype).repeat(count, 1, 1)
    best, least = product.clone(), current.abs().amax((1, 2))
    rotation = random_orthogonal(width - 1, generator)
    for _ in range(steps):
        # One drawn rotation, its rows shuffled and their signs changed for each step: as random for this purpose, and a
        # factorisation per step would cost more than all the rest.
        signs = torch.randint(0, 2, (width - 1, 1), generator=generator) * 2 - 1
        shuffled = rotation[torch.randperm(width - 1, generator=generator)] * signs
        peak = current.abs().amax(1).argmax(1)  # (K,)
        step = _swapped(even_rotation(shuffled).to(x), peak)
        current, product = current @ step, product @ step
        reach = current.abs().amax((1, 2))
        better = reach < least
        least = torch.where(better, reach, least)
        best[better] = product[better]
    return best


def even_rotation(inner: Tensor) -> Tensor:
    """Return a rotation `(width, width)` whose first row has entries of one size.

    Args:
        inner: `(width - 1, width - 1)` in float64, orthogonal: how the other channels are rotated first.
    """
    width = len(inner) + 1
    extended = torch.eye(width, dtype=torch.float64)
    extended[1:, 1:] = inner
    normal = torch.full((width,), -(width**-0.5), dtype=torch.float64)
    normal[0] += 1
    normal /= normal.norm()
    return extended - 2 * torch.outer(
        extended @ normal, normal
    )  # the reflection that takes the first axis to the even one


def _swapped(rotation: Tensor, peak: Tensor) -> Tensor:
    """Return `E R E (K, width, width)`, with `E` the swap of channel 0 and each block's `peak (K,)`."""
    count, width = len(peak), rotation.shape[0]
    order = torch.arange(width, device=peak.device).repeat(count, 1)
    order[:, 0] = peak
    order[torch.arange(count, device=peak.device), peak] = 0
    return rotation[order[:, :, None], order[:, None, :]]
