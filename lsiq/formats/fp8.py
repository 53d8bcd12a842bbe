"""FP8: 8-bit floating-point weights and activations with one float32 scale per channel, token or tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.formats.grid import divided
from lsiq.formats.integer import MAX_SCALE, MIN_SCALE
from lsiq.formats.minifloat import ELEMENTS, FloatGrid, Minifloat
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor


@settings
class FP8(FloatGrid):
    """`ŵ = round(w / h) · h` with `h = max|w| / largest`; the largest number is 448 (e4m3) or 57344 (e5m2).

    Scales are float32 and count as 32 bits: one for each output channel, or one for the matrix.

    Source: Micikevicius et al., FP8 formats for deep learning (arXiv 2209.05433).
    """

    element: Literal["e4m3", "e5m2"] = Field("e4m3", description="e4m3 or e5m2")
    per: Literal["channel", "tensor"] = Field("channel", description="channel or tensor: what shares a scale")

    family = "fp"

    @property
    def element_type(self) -> Minifloat:
        return ELEMENTS[self.element]

    @property
    def trains_steps(self) -> bool:  # type: ignore[override]
        return self.per == "channel"

    @property
    def width(self) -> None:
        return None

    @property
    def suffix(self) -> str:
        return _suffix(self.element, self.per == "tensor")

    @property
    def words(self) -> str:
        return f"8-bit floating point ({self.element}), one float32 scale per {self.per}"

    def fit(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero, both `(out, 1, 1)`, of the channels or the matrix whose weights span `lo … hi`."""
        reach = (-lo).maximum(hi)
        if self.per == "tensor":
            reach = reach.amax().expand_as(reach)
        scale = self.storable(divided(reach, int(self.element_type.largest)))
        return scale, scale.detach().new_zeros(scale.shape)

    def storable(self, scale: Tensor) -> Tensor:
        """Return step sizes within float32's normal numbers."""
        return scale.clamp(MIN_SCALE, MAX_SCALE)

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Bits that a weight of this shape takes: codes and scales of 32 bits."""
        return 8 * out_features * in_features + 32 * (out_features if self.per == "channel" else 1)


@settings
class FP8Activation:
    """Activations as 8-bit floating-point numbers, dynamic: the scale is that of what is rounded.

    In attention the channels of a token are those of one head. The softmax output stays in float unless `softmax` asks
    otherwise.
    """

    element: Literal["e4m3", "e5m2"] = Field("e4m3", description="e4m3 or e5m2")
    per: Literal["token", "tensor"] = Field("token", description="token or tensor: what shares a scale")
    attention: bool = Field(False, description="true quantises queries, keys and values as well")
    softmax: bool = Field(False, description="true quantises the attention weights as well")

    bits, active, family, factors = 8, True, "fp", "fp8"

    @property
    def suffix(self) -> str:
        return _suffix(self.element, self.per == "tensor")

    @property
    def number(self) -> str:
        return self.element

    @property
    def words(self) -> str:
        return f"8-bit floating point ({self.element}), scales per {self.per} found while it runs"

    def fake(self, x: Tensor) -> Tensor:
        """Return `x (…, channels)` on its grid, in its own dtype; rounding lets gradients straight through."""
        element, wide = ELEMENTS[self.element], x.float()
        dims = (-1,) if self.per == "token" else tuple(range(x.dim()))
        scale = self.scale_for(wide.abs().amax(dims, keepdim=True))
        return (element.round(wide / scale) * scale).to(x.dtype)

    def scale_for(self, largest: Tensor) -> Tensor:
        """Return the scale under which `largest`, float32, becomes the largest number."""
        return divided(largest, int(ELEMENTS[self.element].largest)).clamp(MIN_SCALE, MAX_SCALE)

    def fake_under(self, x: Tensor, scale: float) -> Tensor:
        """Return `x` on the grid of a scale that is given, in its own dtype; what lies beyond the largest saturates."""
        return (ELEMENTS[self.element].round(x.float() / scale) * scale).to(x.dtype)

    def fake_softmax(self, weights: Tensor) -> Tensor:
        """Return attention weights in 0 … 1 as the format holds them."""
        return self.fake(weights)


def _suffix(element: str, tensor: bool) -> str:
    return "fp8" + ("" if element == "e4m3" else element) + ("t" if tensor else "")
