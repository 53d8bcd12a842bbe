"""Rotations of channels that are cheap to do while a model runs: permutations and blocks, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lsiq.linalg.hadamard import run_length, split, spreading

# Where a rotation of queries and keys stands among those of linears' inputs.
QUERY_KEY = "query_key"

# Of a factored Hadamard rotation, apart from its base: two factors cover powers of two up to 16 thousand.
_LARGEST_FACTOR = 128


@dataclass(frozen=True)
class RotationStage:
    """`x → (x[order] · sign)`, then each run of `b` neighbours times its block.

    Attributes:
        order: `(n,)` int64, where each channel comes from.
        sign: `(n,)` of ±1.
        blocks: `(n / b, b, b)` orthogonal, or `(1, b, b)` where all runs share one.
    """

    order: Tensor
    sign: Tensor
    blocks: Tensor

    def apply(self, x: Tensor) -> Tensor:
        width = self.blocks.shape[-1]
        runs = (x[..., self.order] * self.sign).unflatten(-1, (-1, width))
        if len(self.blocks) == 1:
            return (runs @ self.blocks[0]).flatten(-2)
        return torch.einsum("...kw,kwv->...kv", runs, self.blocks).flatten(-2)


@dataclass(frozen=True)
class Rotation:
    """An orthogonal `Q (n, n)` as stages that follow each other.

    With the input of a linear rotated, `x → x Q`, and its weight as well, `W → W Q`, the output stays what it was:
    `x Q (W Q)ᵀ = x Wᵀ`.
    """

    stages: tuple[RotationStage, ...]

    @property
    def width(self) -> int:
        return len(self.stages[0].order)

    @property
    def multiplications(self) -> int:
        """Multiply-adds for one token."""
        return sum(self.width * stage.blocks.shape[-1] for stage in self.stages)

    @property
    def stored_bits(self) -> int:
        """As it is stored for use: 16 bits for each entry of a block and each index, one for each sign."""
        return sum(16 * stage.blocks.numel() + 17 * self.width for stage in self.stages)

    def apply(self, x: Tensor) -> Tensor:
        """Return `x Q` for `x (…, n)`, computed in float32, in the dtype of `x`."""
        rotated = x.float()
        for stage in self.stages:
            rotated = stage.apply(rotated)
        return rotated.to(x.dtype)

    def to(self, device: torch.device) -> Rotation:
        return Rotation(
            tuple(RotationStage(s.order.to(device), s.sign.to(device), s.blocks.to(device)) for s in self.stages),
        )

    def tensors(self) -> dict[str, Tensor]:
        """What there is to store, by name; `from_tensors` makes the rotation of it again."""
        return {
            f"{index}.{part}": tensor
            for index, stage in enumerate(self.stages)
            for part, tensor in (("order", stage.order), ("sign", stage.sign), ("blocks", stage.blocks))
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Rotation:
        count = 1 + max(int(name.partition(".")[0]) for name in tensors)
        return Rotation(
            tuple(
                RotationStage(tensors[f"{i}.order"], tensors[f"{i}.sign"], tensors[f"{i}.blocks"]) for i in range(count)
            )
        )

    def then(self, later: Rotation) -> Rotation:
        """Return this rotation followed by another."""
        return Rotation(self.stages + later.stages)


def factored_hadamard(n: int, generator: torch.Generator, block: int | None = None) -> Rotation:
    """Return a random Hadamard rotation of `n` channels as a product of small blocks, with random signs in front.

    A Kronecker product of Hadamard matrices is one itself; each stage multiplies by one factor and rotates the channels
    so that the next factor's come to stand side by side. With `block` there is one stage: each run of so many channels,
    or of the largest divisor of `n` below, is rotated by itself.
    """
    stages: list[RotationStage] = []
    order = torch.arange(n)
    sign = torch.randint(0, 2, (n,), generator=generator).float() * 2 - 1
    if (size := run_length(n, block)) < n:
        return Rotation((RotationStage(order, sign, spreading(size, generator).float()[None]),))
    for size in _factors(n):
        stages.append(RotationStage(order, sign, spreading(size, generator).float()[None]))
        order, sign = torch.arange(n).view(-1, size).t().flatten(), torch.ones(n)
    return Rotation(tuple(stages))


def _factors(n: int) -> list[int]:
    """Write `n` as a product of few sizes: the base that holds its odd factor, and powers of two about alike."""
    base, power = split(n)
    sizes = [base] if base > 1 else []
    exponent = power.bit_length() - 1
    largest = _LARGEST_FACTOR.bit_length() - 1
    for count in range(-(-exponent // largest), 0, -1):
        share = -(-exponent // count)
        sizes.append(2**share)
        exponent -= share
    return sizes or [1]
