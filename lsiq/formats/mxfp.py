"""MXFP4, MXFP6 and MXFP8: blocks of small floating-point numbers that share one power of two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.formats.minifloat import ELEMENTS, ElementName, FloatGrid, Minifloat, power_of_two_below, scale_gradient
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor


BLOCK = 32
Rule = Literal["floor", "even", "ceil"]
_SMALLEST, _LARGEST = -126, 127  # exponents of normal float32 numbers

# With rule=even, from where on the largest weight of a block takes the next power of two, over the power of two below
# it: e2m1 and e2m3 where it would round past the largest number, e4m3 as the library has it.
_EVEN: dict[ElementName, float] = {"e2m1": 1.75, "e2m3": 1.9375, "e3m2": 1.875, "e4m3": 1.75, "e5m2": 1.75}


@settings
class MXFP(FloatGrid):
    """Numbers of an `element` type, one shared scale `h = 2^e` of 8 bits per `block` inputs.

    With `a = max|w|` of the block, `largest = m · 2^top` the element's largest number:

        floor   e = floor(log2 a) - top                               what lies above largest · h saturates
        even    the same, one more where a / 2^floor(log2 a) is at least 2 less half a step: 1.75 for e2m1
        ceil    e = ceil(log2(a / largest))                           nothing saturates
        ŵ = round(w / h) · h

    Source: OCP Microscaling Formats (MX) v1.0, section 5 for the types, 6.3 for floor; compressed-tensors 0.20 for even
    (e3m2 and e5m2, which it lacks, follow its rule); for ceil Mishra et al. (arXiv 2506.08027).
    Deviation: exponents start at -126, not -127, so that scales are normal float32 numbers.
    """

    element: ElementName = Field(description="e2m1 (MXFP4), e2m3 or e3m2 (MXFP6), e4m3 or e5m2 (MXFP8)")
    block: int = Field(BLOCK, ge=1, description="inputs that share a scale, at least 1; 32 in the standard")
    rule: Rule = Field("even", description="floor, even or ceil: how the largest weight of a block gives the scale")

    family = "mxfp"
    width_key = "block"

    @property
    def element_type(self) -> Minifloat:
        return ELEMENTS[self.element]

    @property
    def width(self) -> int:
        return self.block

    @property
    def suffix(self) -> str:
        return _suffix(self.element, self.block, self.rule)

    @property
    def words(self) -> str:
        return f"{self.bits}-bit floating point ({self.element}), blocks of {self.block} inputs with a power of two"

    def fit(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero, both `(out, blocks, 1)`, of the blocks whose weights span `lo … hi`.

        The gradient of the scale is that of a scale proportional to the larger extreme.
        """
        reach = (-lo).maximum(hi)
        scale = scale_gradient(shared_scale(reach.detach(), self.element, self.rule), reach)
        return scale, scale.detach().new_zeros(scale.shape)

    def limits(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Return both ends of the largest block with the same scale."""
        element = self.element_type
        if self.rule == "ceil":
            widest = element.largest
        else:
            above = (2.0 if self.rule == "floor" else _EVEN[self.element]) * 2.0**element.top
            widest = above - 2.0 ** (element.top - 23)  # the float32 number before the one that has the next scale
        reach = self.fit(lo, hi)[0] * widest
        return -reach, reach

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Bits that a weight of this shape takes: codes and one exponent of 8 bits per block."""
        return out_features * (self.bits * in_features + 8 * (in_features // self.block))


@settings
class MXFPActivation:
    """Activations in the format of `MXFP`, dynamic: the scale of a block is that of what is rounded.

    Blocks run along the channels; the last one may be short. In attention the channels of a token are those of one
    head. The softmax output stays in float unless `softmax` asks otherwise.
    """

    element: ElementName = Field(description="e2m1 (MXFP4), e2m3 or e3m2 (MXFP6), e4m3 or e5m2 (MXFP8)")
    block: int = Field(BLOCK, ge=1, description="channels that share a scale, at least 1; 32 in the standard")
    rule: Rule = Field("even", description="floor, even or ceil: how the largest of a block gives the scale")
    attention: bool = Field(False, description="true quantises queries, keys and values as well")
    softmax: bool = Field(False, description="true quantises the attention weights as well")

    active, family, factors = True, "mxfp", "mxfp8"

    @property
    def bits(self) -> int:
        return ELEMENTS[self.element].bits

    @property
    def suffix(self) -> str:
        return _suffix(self.element, self.block, self.rule)

    @property
    def number(self) -> str:
        return self.element

    @property
    def words(self) -> str:
        return f"{self.bits}-bit floating point ({self.element}), blocks of {self.block} channels with a power of two"

    def fake(self, x: Tensor) -> Tensor:
        """Return `x (…, channels)` on its grid, in its own dtype; rounding lets gradients straight through."""
        blocks = in_blocks(x.float(), self.block)
        scale = shared_scale(blocks.detach().abs().amax(-1, keepdim=True), self.element, self.rule)
        rounded = ELEMENTS[self.element].round(blocks / scale) * scale
        return rounded.flatten(-2)[..., : x.shape[-1]].to(x.dtype)

    def fake_softmax(self, weights: Tensor) -> Tensor:
        """Return attention weights in 0 … 1 as the format holds them."""
        return self.fake(weights)


def in_blocks(x: Tensor, width: int) -> Tensor:
    """Return `x (…, channels)` as `(…, blocks, width)`; zeros fill the last block up."""
    import torch

    return torch.nn.functional.pad(x, (0, -x.shape[-1] % width)).unflatten(-1, (-1, width))


def shared_scale(reach: Tensor, name: ElementName, rule: Rule) -> Tensor:
    """Return the power of two that blocks with the largest magnitude `reach` share; NaN where that is not finite."""
    element = ELEMENTS[name]
    power = power_of_two_below(reach)
    share = reach / power.clamp(min=2.0**_SMALLEST)  # in 1 … 2, or less for subnormal numbers
    scale = power * 2.0**-element.top
    if rule == "even":
        scale = scale * (1 + (share >= _EVEN[name]).float())
    elif rule == "ceil":
        scale = scale * (1 + (share > element.largest / 2.0**element.top).float())
    return scale.clamp(2.0**_SMALLEST, 2.0**_LARGEST).where(reach.isfinite(), float("nan"))


def _suffix(element: ElementName, block: int, rule: Rule) -> str:
    bits = ELEMENTS[element].bits
    usual = {4: "e2m1", 6: "e2m3", 8: "e4m3"}[bits]
    name = f"mxfp{bits}" + (element if element != usual else "")
    return name + (f"b{block}" if block != BLOCK else "") + (rule if rule != "even" else "")
