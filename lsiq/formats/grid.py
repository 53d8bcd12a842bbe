"""What all weight formats share: a grid of codes per group of inputs, uniform unless a format says otherwise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from torch import Tensor


class Grid(ABC):
    """Weights on `(code - zero) · scale`, with one scale and zero point per group of inputs.

    A format says how wide its groups are (`width`), which codes it has (`lowest … levels`) and how `fit` makes scale
    and zero point from the extremes of a group; fake, encode and decode are the same for all, so they agree bit for
    bit.

    Attributes:
        bits: per weight, as the name of a setting has them; 16 leaves weights in float.
        lowest: the smallest code.
        width_key: the setting that says how wide groups are.
        separator: what stands between the bits and the suffix in the name of a setting.
        family: what weight and activation formats of one kind share in their names; its width follows it there. Empty
            for formats whose width stands only in front.
        trains_steps: whether steps are numbers of their own that can be trained, not powers of two or the like.
    """

    bits: int
    lowest = 0
    width_key = "group"
    separator = "-"
    family = ""
    trains_steps = False

    @property
    @abstractmethod
    def levels(self) -> int:
        """The largest code."""

    @property
    @abstractmethod
    def width(self) -> int | None:
        """Inputs that share a scale; None for a whole output channel."""

    @property
    def number(self) -> str:
        """What a number is called where multiplications are counted: the width of an integer, or e2m1 and the like."""
        return str(self.bits)

    @property
    @abstractmethod
    def suffix(self) -> str:
        """What the name of a setting says after the bits."""

    @property
    @abstractmethod
    def words(self) -> str:
        """The format in words, for model cards."""

    @abstractmethod
    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Return the bits that a weight of this shape takes, all that decodes it counted."""

    @classmethod
    def named(cls, name: str) -> Self | None:
        """Return the format that a short name such as `w3g128` stands for; None where it is no name of this kind."""
        del name
        return None

    def like(self, other: Grid) -> Self:
        """Return the format with what its name does not say, such as the width of scales, as `other` has it."""
        del other
        return self

    def storable(self, scale: Tensor) -> Tensor:
        """Return step sizes as they can be stored; the gradient passes as if nothing had been rounded."""
        return scale

    def grouped(self, w: Tensor) -> Tensor:
        """View `w (out, in)` as `(out, groups, width)`."""
        return w.reshape(w.shape[0], -1, self.width or w.shape[1])

    def extremes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest weight of each group, zero included, as `(out, groups, 1)`."""
        groups = self.grouped(w)
        return clipped(groups.amin(-1, keepdim=True), high=0), clipped(groups.amax(-1, keepdim=True), low=0)

    @abstractmethod
    def fit(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point, both `(out, groups, 1)`, of the grid that spans `lo … hi`.

        The zero point is whole-numbered, in the dtype of the scale. Gradients reach `lo` and `hi` through the scale.
        """

    @abstractmethod
    def limits(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ends `(out, groups, 1)` to clamp groups to, so that the grid fitted to them is `fit(lo, hi)`.

        Args:
            lo: the lower ends, inside the extremes of the groups.
            hi: the upper ends.
        """

    def fake(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return `w (out, in)` on the grid, in its own dtype; rounding lets gradients straight through.

        Clipped entries pass no gradient to `w`.
        """
        codes = clipped(round_through(self.grouped(w) / scale) + zero, self.lowest, self.levels)
        return ((codes - zero) * scale).reshape(w.shape)

    def encode(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the codes of `w (out, in)`, uint8."""
        return self.nearest(self.grouped(w), scale, zero).reshape(w.shape).byte()

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the weights that `codes (out, in)` stand for; equals `fake` of what was encoded, bit for bit."""
        return self.value(self.grouped(codes).to(scale.dtype), scale, zero).reshape(codes.shape)

    def nearest(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the code nearest to each weight, in the dtype of `w`; scale and zero point broadcast against it."""
        return ((w / scale).round() + zero).clamp(self.lowest, self.levels)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the weight that each code stands for; `codes` have the dtype of the scale."""
        return (codes - zero) * scale

    def fit_beside(self, lo: Tensor, hi: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of some groups of a matrix whose groups had `scale (out, groups, 1)` before.

        It is `fit`, but for formats in which something is shared by the whole matrix: that stays.
        """
        del scale
        return self.fit(lo, hi)

    def spacing(self, w: Tensor, scale: Tensor) -> Tensor:
        """Return how far apart the grid's points lie around each of `w (out, groups, width)`; broadcasts against it."""
        del w
        return scale

    def mean_steps(self, w: Tensor) -> Tensor:
        """Return how far apart the grid's points lie around the weights `(out, in)`, the mean of each group.

        The grid is the one that spans them; `(out, groups, 1)`.
        """
        scale, _ = self.fit(*self.extremes(w))
        return self.spacing(self.grouped(w), scale).mean(-1, keepdim=True)

    def place(self, w: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return where in its cell each weight stands, in distances to the neighbour on its side; 0 is the centre.

        Args:
            w: `(out, groups, width)`.
            codes: of the same shape, in the dtype of the scale.
        """
        return w / scale - (codes - zero)

    def placed(self, codes: Tensor, place: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the weights that stand at `place` in the cells of `codes`, both `(out, groups, width)`."""
        return (codes - zero + place) * scale

    def narrowed(self, in_features: int) -> Grid:
        """Return the format with the widest groups that divide both its own and `in_features`."""
        if self.width is None or in_features % self.width == 0:
            return self
        return replace(self, **{self.width_key: math.gcd(self.width, in_features)})  # type: ignore[type-var]


def clipped(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """Return `x` clamped to a range; its gradient passes where `x` lies in it, ends included."""
    if not x.requires_grad:
        return x.clamp(low, high)
    from lsiq.formats.rounding import clip  # torch only once there is something to compute

    return clip(x, low, high)


def round_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing had been rounded."""
    if not x.requires_grad:
        return x.round()
    from lsiq.formats.rounding import (
        straight_through as differentiable,  # torch only once there is something to compute
    )

    return differentiable(x)


def divided(x: Tensor, number: int) -> Tensor:
    """Return `x / number`, rounded as the division itself is.

    On a GPU torch divides by a number of the host by multiplying with its inverse, which is off in the last place.
    """
    return x / x.new_full((), number)
