"""A number format: integers whose steps are powers of two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from lsiq.formats.grid import Grid
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor


@settings
class CoarseSteps(Grid):
    """Symmetric integers of `bits` bits with a step of `2^e` for each group of inputs; e takes 8 bits."""

    bits: int = Field(ge=2, le=8, description="2 to 8 bits per weight")
    group: int = Field(ge=1, description="inputs that share a step")

    lowest = 1

    @property
    def levels(self) -> int:
        return 2**self.bits - 1

    @property
    def width(self) -> int:
        return self.group

    @property
    def suffix(self) -> str:
        return f"coarse{self.group}"

    @property
    def words(self) -> str:
        return f"{self.bits} bits, groups of {self.group} inputs, steps that are powers of two"

    def fit(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        reach = (-lo).maximum(hi).clamp(min=2.0**-100)
        exact = reach / (2 ** (self.bits - 1) - 1)
        scale = exact.detach().log2().ceil().exp2()
        scale = scale * (exact / exact.detach())  # the value of a power of two, the gradient of the exact step
        return scale, scale.detach().new_full(scale.shape, 2 ** (self.bits - 1))

    def limits(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        reach = (-lo).maximum(hi)
        return -reach, reach

    def stored_bits(self, out_features: int, in_features: int) -> int:
        return out_features * (self.bits * in_features + 8 * (in_features // self.group))
