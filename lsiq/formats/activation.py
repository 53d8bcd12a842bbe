"""The format of the activations that enter the linears of a block, and of queries, keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.formats.grid import clipped, divided, round_through
from lsiq.formats.integer import MAX_SCALE, MIN_SCALE
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor


def check_activation_bits(bits: int) -> None:
    """Raise ValueError for widths that are neither narrow nor float."""
    if 8 < bits < 16:
        raise ValueError(f"bits={bits}: nothing lies between 8 and 16; use 4 to 8, or 16 for float activations")


@settings
class Activation:
    """Dynamic integers of `bits` bits: the range is the minimum and maximum (zero included) of what is rounded.

    The formula is that of `Integer`; the range is taken from each token's channels, or from the whole tensor. In
    attention the channels of a token are those of one head. The softmax output stays in float unless `softmax` asks
    otherwise: it lies in 0 … 1 and is quantised with that fixed range, all of it.

    With `clip` below 1 both ends of a range are multiplied by it before scale and zero point are made of them, and
    what lies beyond takes the outermost number. A value that is clipped so has no gradient of its own; like that of
    every value, its part in the scale reaches the extremes of the range.

    Source: OmniQuant (arXiv 2308.13137, section 4.1 and its code): per token, dynamic, queries, keys and values too.
    For `clip`: QuaRot (arXiv 2404.00456, section 5, `a_clip_ratio` in its code); DuQuant's code (`--lac`).
    Deviation: QuaRot leaves queries in float; here they are clipped as other activations are.
    """

    bits: int = Field(16, ge=4, le=16, description="4 to 8 bits per activation, or 16 to leave them in float")
    per: Literal["token", "tensor"] = Field("token", description="token or tensor")
    symmetric: bool = Field(False, description="true or false")
    attention: bool = Field(True, description="true quantises queries, keys and values as well")
    softmax: bool = Field(False, description="true quantises the attention weights as well")
    clip: float = Field(1.0, gt=0, le=1, description="share of each range that is kept; 1 clips nothing")

    family, factors = "", "float16"

    def __post_init__(self) -> None:
        check_activation_bits(self.bits)
        if self.clip < 1 and not self.active:
            raise ValueError(
                f"clip={self.clip:g}: float activations have no range; use 4 to 8 bits (quant=w4a4), or clip=1"
            )

    @property
    def active(self) -> bool:
        return self.bits < 16

    @property
    def suffix(self) -> str:
        return "" if self.clip == 1 else f"clip{self.clip:g}"

    @property
    def number(self) -> str:
        return str(self.bits)

    @property
    def words(self) -> str:
        kept = "" if self.clip == 1 else f", {self.clip:g} of each kept"
        return f"{self.bits} bits per {self.per}, ranges found while it runs{kept}"

    def fake(self, x: Tensor) -> Tensor:
        """Return `x (…, channels)` on its grid, in its own dtype; rounding lets gradients straight through."""
        if not self.active:
            return x
        dims = (-1,) if self.per == "token" else tuple(range(x.dim()))
        return rounded(x, dims, self.bits, self.symmetric, self.clip)

    def fake_softmax(self, weights: Tensor) -> Tensor:
        """Return attention weights in 0 … 1 on the fixed grid of `bits` bits."""
        levels = 2**self.bits - 1
        return divided(round_through(weights * levels), levels)


def rounded(x: Tensor, dims: tuple[int, ...], bits: int, symmetric: bool, clip: float = 1.0) -> Tensor:
    """Return `x` as integers over the range that `dims` share, zero included; rounding lets gradients straight through.

    Dtype and shape are those of `x`. What `clip` cuts off passes no gradient but through the scale.

    Args:
        clip: the share of the range, of either end, that is kept.
    """
    wide = x.float()  # the range of half precision is too small for the scale of a quiet token
    lo, hi = clipped(wide.amin(dims, keepdim=True), high=0), clipped(wide.amax(dims, keepdim=True), low=0)
    if clip < 1:
        lo, hi = lo * clip, hi * clip
    if symmetric:
        half = 2 ** (bits - 1)
        scale = divided((-lo).maximum(hi), half - 1).clamp(MIN_SCALE, MAX_SCALE)
        return (clipped(round_through(wide / scale), -half, half - 1) * scale).to(x.dtype)
    levels = 2**bits - 1
    scale = divided(hi - lo, levels).clamp(MIN_SCALE, MAX_SCALE)
    zero = round_through(-lo / scale)
    return ((clipped(round_through(wide / scale) + zero, 0, levels) - zero) * scale).to(x.dtype)
