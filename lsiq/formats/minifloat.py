"""Floating-point numbers of 4 to 8 bits: how they are rounded to, coded and read."""

from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lsiq.formats.grid import Grid, clipped, round_through

if TYPE_CHECKING:
    import torch
    from torch import Tensor


ElementName = Literal["e2m1", "e2m3", "e3m2", "e4m3", "e5m2"]


@dataclass(frozen=True)
class Minifloat:
    """A sign, `exponent` bits and `mantissa` bits; no infinities and no NaN among what is rounded to.

    With the exponents `least … top`, a number is `±m · 2^(e - mantissa)`, `m < 2^mantissa` only where `e = least`. What
    lies beyond `largest` becomes `largest`. Ties go to the even mantissa. A code is the bit pattern, `-0` included.

    Attributes:
        largest: the largest number; of `e4m3` and `e5m2` the patterns above it are NaN and infinity.
    """

    exponent: int
    mantissa: int
    largest: float

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def least(self) -> int:
        """The exponent of the smallest normal number, and of all subnormal ones."""
        return 2 - 2 ** (self.exponent - 1)

    @property
    def top(self) -> int:
        """The exponent of the largest number."""
        return next(e for e in range(self.least, 64) if 2.0 ** (e + 1) > self.largest)

    @property
    def smallest(self) -> float:
        """The smallest number above zero."""
        return 2.0 ** (self.least - self.mantissa)

    @property
    def largest_code(self) -> int:
        """The code of `-largest`, above which no code is used."""
        steps = int(self.largest / 2.0 ** (self.top - self.mantissa))
        return 2 ** (self.bits - 1) + (self.top - self.least) * 2**self.mantissa + steps

    def spacing(self, x: Tensor) -> Tensor:
        """Return how far apart the numbers lie around each `x`, from it away from zero; no gradient passes."""
        magnitude = x.detach().abs().clamp(max=self.largest)
        return (power_of_two_below(magnitude).clamp(min=2.0**self.least) * 2.0**-self.mantissa).to(x.dtype)

    def round(self, x: Tensor) -> Tensor:
        """Return the number nearest to each `x`; the gradient passes where nothing saturates."""
        clamped = clipped(x, -self.largest, self.largest)
        spacing = self.spacing(clamped)
        return round_through(clamped / spacing) * spacing

    def encode(self, x: Tensor) -> Tensor:
        """Return the code of the number nearest to each `x`, in the dtype of `x`."""
        magnitude = x.detach().abs().clamp(max=self.largest)
        spacing = self.spacing(magnitude)
        steps = (magnitude / spacing).round()  # 2^mantissa where a number rounds up to the next exponent
        binade = (spacing / self.smallest).log2().round()  # of a power of two: exact
        return steps + binade * 2**self.mantissa + x.signbit() * 2.0 ** (self.bits - 1)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the number that each code stands for."""
        return _numbers(self, dtype, codes.device)[codes.int()]

    def numbers(self) -> list[float]:
        """The number of every code from 0 on, NaN where there is none."""
        positive = []
        for code in range(2 ** (self.bits - 1)):
            field, mantissa = divmod(code, 2**self.mantissa)
            steps = mantissa if field == 0 else mantissa + 2**self.mantissa
            number = steps * 2.0 ** (max(field, 1) - 1 + self.least - self.mantissa)
            positive.append(number if number <= self.largest else float("nan"))
        return positive + [-number for number in positive]


ELEMENTS: dict[ElementName, Minifloat] = {
    "e2m1": Minifloat(2, 1, 6.0),
    "e2m3": Minifloat(2, 3, 7.5),
    "e3m2": Minifloat(3, 2, 28.0),
    "e4m3": Minifloat(4, 3, 448.0),
    "e5m2": Minifloat(5, 2, 57344.0),
}


class FloatGrid(Grid):
    """Weights on `number · scale`, the numbers those of a `Minifloat`; there is no zero point.

    The codes are bit patterns; the zero point that goes with a scale is 0 and means nothing.
    """

    @property
    @abstractmethod
    def element_type(self) -> Minifloat:
        """The floating-point type of the codes."""

    @property
    def levels(self) -> int:
        """The largest code."""
        return self.element_type.largest_code

    @property
    def bits(self) -> int:  # type: ignore[override]
        return self.element_type.bits

    @property
    def number(self) -> str:
        """Exponent and mantissa bits, such as e2m1."""
        return f"e{self.element_type.exponent}m{self.element_type.mantissa}"

    def limits(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Return the larger of both at both ends."""
        reach = (-lo).maximum(hi)
        return -reach, reach

    def fake(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return `w (out, in)` on the grid, in its own dtype; rounding lets gradients straight through.

        Clipped entries pass no gradient to `w`.
        """
        del zero
        return (self.element_type.round(self.grouped(w) / scale) * scale).reshape(w.shape)

    def nearest(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the code nearest to each weight, in the dtype of `w`; the scale broadcasts against it."""
        del zero
        return self.element_type.encode(w / scale)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the weight that each code stands for, in the dtype of the scale."""
        del zero
        return self.element_type.decode(codes, scale.dtype) * scale

    def spacing(self, w: Tensor, scale: Tensor) -> Tensor:
        """Return how far apart the grid's points lie around each of `w (out, groups, width)`."""
        return self.element_type.spacing(w / scale) * scale

    def place(self, w: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return where in its cell each weight stands, in distances to the neighbour on its side."""
        del zero
        number = self.element_type.decode(codes, scale.dtype)
        offset = w / scale - number
        return offset / self._distance(number, offset)

    def placed(self, codes: Tensor, place: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the weights that stand at `place` in the cells of `codes`."""
        del zero
        number = self.element_type.decode(codes, scale.dtype)
        return (number + place * self._distance(number, place)) * scale

    def _distance(self, number: Tensor, side: Tensor) -> Tensor:
        """How far the neighbour of each number is on the side that the sign of `side` says."""
        away = self.element_type.spacing(number)
        towards_zero = self.element_type.spacing(number.abs() - away / 2)
        return away.where(number * side >= 0, towards_zero)


def power_of_two_below(x: Tensor) -> Tensor:
    """Return `2^floor(log2 x)` of `x` of float32's range, 0 for its subnormal numbers; exact on every device."""
    import torch

    return (x.float().view(torch.int32) & 0x7F800000).view(torch.float32)


def scale_gradient(scale: Tensor, reach: Tensor) -> Tensor:
    """Return `scale` with the gradient of a scale proportional to `reach`, the larger extreme of a group.

    Groups that are too small for their scale to follow them pass none.
    """
    if not reach.requires_grad:
        return scale
    ratio = scale / reach.detach().clamp(min=2.0**-126)
    soft = reach * ratio.where(ratio <= 1, 0.0)
    return scale + (soft - soft.detach())


@functools.lru_cache(maxsize=64)
def _numbers(element: Minifloat, dtype: torch.dtype, device: torch.device) -> Tensor:
    import torch

    return torch.tensor(element.numbers(), dtype=dtype, device=device)
