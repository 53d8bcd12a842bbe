"""Integer grids for weights: asymmetric or symmetric, one scale per output channel or per group of inputs."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.formats.grid import Grid, clipped, divided, round_through
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor


# The smallest and largest steps: the smallest normal float32, so that a dead group divides by something, and a step
# at which even a group that spans all of float32 stays finite.
MIN_SCALE = 1.1754944e-38
MAX_SCALE = 3.4028234e38


@settings
class Integer(Grid):
    """Uniform integers of `bits` bits.

    With `w` the weights of one group, `lo = min(w, 0)`, `hi = max(w, 0)` and `n = 2^bits - 1`:

        asymmetric   h = (hi - lo) / n,   z = clamp(round(-lo / h), 0, n)
        symmetric    h = max(-lo, hi) / (2^(bits-1) - 1),   z = 2^(bits-1)
        ŵ = (clamp(round(w / h) + z, 0, n) - z) · h

    Rounding is half to even. Source: methods as in OmniQuant (arXiv 2308.13137, equation 2) with γ = β = 1.

    Scales are float32 while a run lasts (`scale="float32"`), as in the papers' simulations; `scale="float16"` rounds
    them to the width at which deployed checkpoints store them. Average bits count 16 either way.
    """

    bits: int = Field(ge=2, le=16, description="2 to 8 bits per weight, or 16 to leave the weights untouched")
    group: int | None = Field(None, ge=1, description="inputs that share a scale, or null for a whole output channel")
    symmetric: bool = Field(False, description="true or false")
    scale: Literal["float32", "float16"] = Field("float32", description="float32 or float16")

    separator = ""
    trains_steps = True

    def __post_init__(self) -> None:
        if 8 < self.bits < 16:
            raise ValueError(
                f"bits={self.bits}: nothing lies between 8 and 16; use 2 to 8, or 16 for untouched weights"
            )

    @classmethod
    def named(cls, name: str) -> Integer | None:
        """Return the integers that `float`, `w3`, `w3g128` or `w3g128-sym` stand for."""
        if name == "float":
            return cls(bits=16, group=None, symmetric=False, scale="float32")
        if (match := re.fullmatch(r"w([2-8])(?:g([1-9]\d*))?(-sym)?", name)) is None:
            return None
        bits, group, symmetric = match.groups()
        width = int(group) if group else None
        return cls(bits=int(bits), group=width, symmetric=symmetric is not None, scale="float32")

    def like(self, other: Grid) -> Integer:
        return replace(self, scale=other.scale) if isinstance(other, Integer) and self.bits < 16 else self

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def width(self) -> int | None:
        return self.group

    @property
    def suffix(self) -> str:
        """What the name of a setting says after the bits: the group size and symmetry."""
        return (f"g{self.group}" if self.group else "") + ("-sym" if self.symmetric else "")

    @property
    def words(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        shared = f"groups of {self.group} inputs" if self.group else "one scale per output channel"
        return f"{self.bits} bits, {kind}, {shared}, {self.scale} scales"

    def fit(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point, both `(out, groups, 1)`, of the grid that spans `lo … hi`.

        The zero point is whole-numbered, in the dtype of the scale. Gradients reach `lo` and `hi` through the scale
        and, straight through the rounding, through the zero point.
        """
        if self.symmetric:
            scale = divided((-lo).maximum(hi), 2 ** (self.bits - 1) - 1)
        else:
            scale = divided(hi - lo, self.levels)
        scale = self.storable(scale)
        if self.symmetric:
            return scale, scale.detach().new_full(scale.shape, 2 ** (self.bits - 1))
        zero = clipped(round_through(-lo / scale), 0, self.levels)
        return scale, zero

    def limits(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Return `lo, hi`, or the larger of them at both ends of a symmetric grid."""
        reach = (-lo).maximum(hi)
        return (-reach, reach) if self.symmetric else (lo, hi)

    def storable(self, scale: Tensor) -> Tensor:
        """Return step sizes as they can be stored; the gradient passes as if nothing had been rounded."""
        if self.scale == "float16":
            scale = scale.clamp(max=MAX_SCALE)  # the difference of two infinities would be no number
            half = scale.half().to(scale.dtype)
            scale = scale + (half - scale).detach()
            scale = scale.clamp(2.0**-24, 65504.0)  # the smallest and largest half-precision numbers
        return scale.clamp(MIN_SCALE, MAX_SCALE)

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Bits that a weight of this shape takes: codes, one 16-bit scale and, if asymmetric, one zero per group."""
        if self.bits == 16:
            return 16 * out_features * in_features
        groups = out_features * (in_features // self.group if self.group else 1)
        return self.bits * out_features * in_features + groups * (16 + (0 if self.symmetric else self.bits))
