"""The low-rank product that runs beside a quantised weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsiq.formats.base import WeightFormat
from lsiq.formats.tensor import QuantizedTensor, quantize

Factor = Tensor | QuantizedTensor


@dataclass(frozen=True)
class SideBranch:
    """`y += up (down x)`: factors `up (out, rank)` and `down (rank, in)`, each in float16 or in blocks."""

    up: Factor
    down: Factor

    @property
    def rank(self) -> int:
        return _shape(self.up)[1]

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the weight it belongs to."""
        return _shape(self.up)[0], _shape(self.down)[1]

    @property
    def bits(self) -> int:
        """Of one value of a factor."""
        return self.up.format.bits if isinstance(self.up, QuantizedTensor) else 16

    @property
    def number(self) -> str:
        """What a value of a factor is called where multiplications are counted."""
        return self.up.format.number if isinstance(self.up, QuantizedTensor) else "16"

    @property
    def stored_bits(self) -> int:
        return sum(f.stored_bits if isinstance(f, QuantizedTensor) else 16 * f.numel() for f in (self.up, self.down))

    def decode(self) -> tuple[Tensor, Tensor]:
        """The factors that are computed with, in float32."""
        up, down = (f.decode() if isinstance(f, QuantizedTensor) else f.float() for f in (self.up, self.down))
        return up, down

    def cpu(self) -> SideBranch:
        return SideBranch(self.up.cpu(), self.down.cpu())


def round_factors(up: Tensor, down: Tensor, fmt: WeightFormat | None, name: str) -> SideBranch:
    """Return the branch with its factors in `fmt`, or in float16 where that is None.

    Blocks run along what each product sums over, as in a dot product's hardware: `rank` of `up`, `in` of `down`. Where
    those of the format do not divide them the blocks are smaller.
    """
    up, down = up.contiguous(), down.contiguous()  # as they are read back: the strides decide the last bit of products
    if fmt is None:
        return SideBranch(up.to(torch.float16), down.to(torch.float16))
    return SideBranch(
        quantize(up, fmt.narrowed(up.shape[1]), f"{name}, up"),
        quantize(down, fmt.narrowed(down.shape[1]), f"{name}, down"),
    )


def _shape(factor: Factor) -> tuple[int, int]:
    rows, columns = factor.codes.shape if isinstance(factor, QuantizedTensor) else factor.shape
    return rows, columns
