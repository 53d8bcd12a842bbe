"""Integer grids for weights: asymmetric or symmetric, one scale per output channel or per group of inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.errors import ConfigError
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor

# The smallest and largest steps: the smallest normal float32, so that a dead group divides by something, and a step
# at which even a group that spans all of float32 stays finite.
MIN_SCALE = 1.1754944e-38
MAX_SCALE = 3.4028234e38


@settings
class Integer:
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

    def __post_init__(self) -> None:
        if 8 < self.bits < 16:
            raise ValueError(
                f"bits={self.bits}: nothing lies between 8 and 16; use 2 to 8, or 16 for untouched weights"
            )

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def suffix(self) -> str:
        """What the name of a setting says after the bits: the group size and symmetry."""
        return (f"g{self.group}" if self.group else "") + ("-sym" if self.symmetric else "")

    def check(self, in_features: int, name: str) -> None:
        """Raise ConfigError unless the groups divide `in_features`, the input width of the linear `name`."""
        if self.bits < 16 and self.group is not None and in_features % self.group:
            divisors = [str(d) for d in range(1, in_features + 1) if in_features % d == 0]
            shown = divisors if len(divisors) <= 16 else ["…", *divisors[-15:]]
            raise ConfigError(
                f"quant.weight.group={self.group} does not divide in_features={in_features} of {name}; "
                f"use one of {', '.join(shown)} or null"
            )

    def grouped(self, w: Tensor) -> Tensor:
        """View `w (out, in)` as `(out, groups, group)`."""
        return w.reshape(w.shape[0], -1, self.group or w.shape[1])

    def extremes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest weight of each group, zero included, as `(out, groups, 1)`."""
        groups = self.grouped(w)
        return groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)

    def fit(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point, both `(out, groups, 1)`, of the grid that spans `lo … hi`.

        The zero point is whole-numbered, in the dtype of the scale. Gradients reach `lo` and `hi` through the scale
        and, straight through the rounding, through the zero point.
        """
        scale = (-lo).maximum(hi) / (2 ** (self.bits - 1) - 1) if self.symmetric else (hi - lo) / self.levels
        scale = self.storable(scale)
        if self.symmetric:
            return scale, scale.detach().new_full(scale.shape, 2 ** (self.bits - 1))
        zero = round_through(-lo / scale).clamp(0, self.levels)
        return scale, zero

    def storable(self, scale: Tensor) -> Tensor:
        """Return step sizes as they can be stored; the gradient passes as if nothing had been rounded."""
        if self.scale == "float16":
            half = scale.half().to(scale.dtype)
            scale = scale + (half - scale).detach()
            scale = scale.clamp(2.0**-24, 65504.0)  # the smallest and largest half-precision numbers
        return scale.clamp(MIN_SCALE, MAX_SCALE)

    def fake(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return `w (out, in)` on the grid, in its own dtype; rounding lets gradients straight through.

        Clipped entries pass no gradient to `w`.
        """
        codes = (round_through(self.grouped(w) / scale) + zero).clamp(0, self.levels)
        return ((codes - zero) * scale).reshape(w.shape)

    def encode(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the codes of `w (out, in)`, uint8."""
        codes = ((self.grouped(w) / scale).round() + zero).clamp(0, self.levels)
        return codes.reshape(w.shape).byte()

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the weights that `codes (out, in)` stand for; equals `fake` of what was encoded, bit for bit."""
        groups = self.grouped(codes).to(scale.dtype)
        return ((groups - zero) * scale).reshape(codes.shape)

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Bits that a weight of this shape takes: codes, one 16-bit scale and, if asymmetric, one zero per group."""
        if self.bits == 16:
            return 16 * out_features * in_features
        groups = out_features * (in_features // self.group if self.group else 1)
        return self.bits * out_features * in_features + groups * (16 + (0 if self.symmetric else self.bits))


def round_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing had been rounded."""
    if not x.requires_grad:
        return x.round()
    from lsiq.formats.rounding import round_through as differentiable  # torch only once there is something to compute

    return differentiable(x)
