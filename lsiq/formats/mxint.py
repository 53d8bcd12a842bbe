"""MXINT: blocks of signed integers that share one power of two, for weights and activations."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.formats.activation import check_activation_bits
from lsiq.formats.grid import Grid, clipped, round_through
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor


BLOCK = 16
_SMALLEST, _LARGEST = -126, 127  # exponents of normal float32 numbers


@settings
class MXInt(Grid):
    """Sign and magnitude in `bits` bits, one shared exponent of `exponent` bits per `block` inputs.

    With `a = max|w|` of the block and `n = 2^(bits-1) - 1`:

        e = ceil(log2 a), kept in -(2^(exponent-1) - 1) … 2^(exponent-1)
        ŵ = clamp(round(w / h), -n, n) · h,   h = 2^(e - bits + 1)

    The largest weight of a block lies in `2^(e-1) … 2^e`, so it may saturate at `(1 - 2^(1-bits)) · 2^e`. Two bits
    make the grid `-1, 0, 1`. Codes are stored with `n + 1` added; steps are normal float32 numbers.

    `exponent=8` is what LQER's public code emulates, `exponent=4` what its bit counts assume; with 4 bits, blocks below
    2^-8 lose precision and values above 2^8 saturate.

    Source: LQER (arXiv 2402.02446, section 3.1 and its code).
    """

    bits: int = Field(ge=2, le=8, description="2 to 8 bits per weight, the sign included")
    block: int = Field(BLOCK, ge=1, description="inputs that share an exponent, at least 1")
    exponent: Literal[4, 8] = Field(8, description="bits of the shared exponent, 4 or 8")

    lowest = 1  # magnitudes are symmetric: the code 0 is not used
    width_key = "block"

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @classmethod
    def named(cls, name: str) -> MXInt | None:
        """Return the blocks that `w4-mxint`, `w4-mxint32` or `w4-mxinte4` stand for."""
        if (match := re.fullmatch(r"w([2-8])-mxint([1-9]\d*)?(e4)?", name)) is None:
            return None
        bits, block, small_exponent = match.groups()
        return cls(bits=int(bits), block=int(block) if block else BLOCK, exponent=4 if small_exponent else 8)

    @property
    def width(self) -> int:
        return self.block

    @property
    def suffix(self) -> str:
        """What the name of a setting says after the bits: the format, and what is not usual about it."""
        return _suffix(self.block, self.exponent)

    @property
    def words(self) -> str:
        return (
            f"{self.bits} bits with their sign, blocks of {self.block} inputs with an exponent of {self.exponent} bits"
        )

    def fit(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Return step and zero point, both `(out, blocks, 1)`, of the block whose weights span `lo … hi`.

        The gradient of the step is that of a step proportional to the larger extreme.
        """
        reach = (-lo).maximum(hi)
        scale = power_of_two_step(reach.detach(), self.bits, self.exponent)
        if reach.requires_grad:
            soft = reach * (scale / reach.detach().clamp(min=2.0**_SMALLEST))
            scale = scale + (soft - soft.detach())
        return scale, scale.detach().new_full(scale.shape, 2 ** (self.bits - 1))

    def limits(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Return both ends of the largest block with the same exponent."""
        reach = self.fit(lo, hi)[0] * 2 ** (self.bits - 1)
        return -reach, reach

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Bits that a weight of this shape takes: codes and one exponent per block."""
        return out_features * (self.bits * in_features + self.exponent * (in_features // self.block))


@settings
class MXActivation:
    """Activations in the format of `MXInt`, dynamic: the exponent of a block is that of what is rounded.

    Blocks run along the channels; the last one may be short. In attention the channels of a token are those of one
    head. The softmax output stays in float unless `softmax` asks otherwise.
    """

    bits: int = Field(ge=4, le=16, description="4 to 8 bits per activation, or 16 to leave them in float")
    block: int = Field(BLOCK, ge=1, description="channels that share an exponent, at least 1")
    exponent: Literal[4, 8] = Field(8, description="bits of the shared exponent, 4 or 8")
    attention: bool = Field(True, description="true quantises queries, keys and values as well")
    softmax: bool = Field(False, description="true quantises the attention weights as well")

    family = ""

    def __post_init__(self) -> None:
        check_activation_bits(self.bits)

    @property
    def active(self) -> bool:
        return self.bits < 16

    @property
    def suffix(self) -> str:
        """What tells this format from the usual one."""
        return _suffix(self.block, self.exponent)

    @property
    def number(self) -> str:
        return str(self.bits)

    @property
    def factors(self) -> str:
        return "mxint8" if self.active else "float16"

    @property
    def words(self) -> str:
        return f"{self.bits} bits, blocks of {self.block} channels with an exponent of {self.exponent} bits"

    def fake(self, x: Tensor) -> Tensor:
        """Return `x (…, channels)` on its grid, in its own dtype; rounding lets gradients straight through."""
        if not self.active:
            return x
        import torch

        channels = x.shape[-1]
        blocks = torch.nn.functional.pad(x.float(), (0, -channels % self.block)).unflatten(-1, (-1, self.block))
        step = power_of_two_step(blocks.detach().abs().amax(-1, keepdim=True), self.bits, self.exponent)
        largest = 2 ** (self.bits - 1) - 1
        rounded = clipped(round_through(blocks / step), -largest, largest) * step
        return rounded.flatten(-2)[..., :channels].to(x.dtype)

    def fake_softmax(self, weights: Tensor) -> Tensor:
        """Return attention weights in 0 … 1 on the grid of their blocks."""
        return self.fake(weights)


def power_of_two_step(reach: Tensor, bits: int, exponent: int) -> Tensor:
    """Return `2^(ceil(log2 reach) - bits + 1)`, its exponent kept in range; exact on every device."""
    import torch

    bias = 2 ** (exponent - 1) - 1
    mantissa, power = torch.frexp(reach.float())  # reach = mantissa · 2^power, mantissa in 0.5 … 1
    power = (power - (mantissa == 0.5).int()).masked_fill(mantissa == 0, -bias).clamp(-bias, bias + 1)
    biased = (power - bits + 1).clamp(_SMALLEST, _LARGEST) + 127
    return (biased.int() << 23).view(torch.float32).to(reach.dtype)


def _suffix(block: int, exponent: int) -> str:
    return "mxint" + (f"{block}" if block != BLOCK else "") + (f"e{exponent}" if exponent != 8 else "")
