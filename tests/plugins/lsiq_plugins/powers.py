"""A number format: signed powers of two, floating-point numbers without a mantissa."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from lsiq.formats.minifloat import FloatGrid, Minifloat, scale_gradient
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor


@settings
class Powers(FloatGrid):
    """`0, ±1/4, ±1/2, … ±16` times a float32 scale for each group of inputs: 4 bits, and 32 for the scale."""

    group: int = Field(ge=1, description="inputs that share a scale")

    @property
    def element_type(self) -> Minifloat:
        return Minifloat(exponent=3, mantissa=0, largest=16.0)

    @property
    def width(self) -> int:
        return self.group

    @property
    def suffix(self) -> str:
        return f"powers{self.group}"

    @property
    def words(self) -> str:
        return f"{self.bits} bits, powers of two, groups of {self.group} inputs"

    def fit(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        reach = (-lo).maximum(hi).clamp(min=2.0**-100)
        scale = scale_gradient(reach.detach() / self.element_type.largest, reach)
        return scale, scale.detach().new_zeros(scale.shape)

    def stored_bits(self, out_features: int, in_features: int) -> int:
        return out_features * (self.bits * in_features + 32 * (in_features // self.group))
