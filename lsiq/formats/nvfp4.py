"""NVFP4: blocks of 16 4-bit floating-point numbers, each with an 8-bit floating-point scale under one of float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.formats.grid import divided
from lsiq.formats.minifloat import ELEMENTS, FloatGrid, Minifloat, scale_gradient
from lsiq.formats.mxfp import in_blocks
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor


BLOCK = 16
_NUMBER, _SCALE = ELEMENTS["e2m1"], ELEMENTS["e4m3"]
_LARGEST = int(_NUMBER.largest * _SCALE.largest)


@settings
class NVFP4(FloatGrid):
    """Numbers `±0, 0.5, 1, 1.5, 2, 3, 4, 6` on two levels of scales.

    With `a = max|w|` of a block of `block` inputs and `A = max|w|` of the matrix:

        g = 6 · 448 / A,   b = round(a / 6 · g) as e4m3, at least its smallest number,   h = b / g
        ŵ = round(w / h) · h

    `h` is what `fit` returns; `split_scale` finds `b` and `g` again. Linears that are rounded as one matrix, as GPTQ
    does with those of a stage, share `g`.

    Source: NVIDIA, Pretraining large language models with NVFP4 (arXiv 2509.25149); compressed-tensors 0.20 for the
    order of the operations, `g` as a divisor included.
    Deviation: where `b` would be 0, compressed-tensors takes 0.125, which makes the block zeros, and torchao 2^-6; here
    it is the smallest number there is, 2^-9.
    """

    block: int = Field(BLOCK, ge=1, description="inputs that share an 8-bit scale, at least 1; 16 in hardware")

    family = "nvfp"
    width_key = "block"

    @property
    def element_type(self) -> Minifloat:
        return _NUMBER

    @property
    def width(self) -> int:
        return self.block

    @property
    def suffix(self) -> str:
        return _suffix(self.block)

    @property
    def words(self) -> str:
        return f"4-bit floating point (e2m1), blocks of {self.block} inputs with an e4m3 scale, one of float32 above"

    def fit(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero, both `(out, blocks, 1)`, of the blocks whose weights span `lo … hi`.

        The gradient of a scale is that of a scale proportional to its block's larger extreme.
        """
        reach = (-lo).maximum(hi)
        return self._scaled(reach, matrix_scale(reach.detach().amax()))

    def fit_beside(self, lo: Tensor, hi: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return `fit` of some blocks under the float32 scale that the matrix had."""
        return self._scaled((-lo).maximum(hi), split_scale(scale)[1])

    def _scaled(self, reach: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        scale = scale_gradient(block_scale(reach.detach(), matrix) / matrix, reach)
        return scale, scale.detach().new_zeros(scale.shape)

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Bits that a weight of this shape takes: codes, 8 for each block, and 32."""
        return out_features * (4 * in_features + 8 * (in_features // self.block)) + 32


@settings
class NVFP4Activation:
    """Activations in the format of `NVFP4`, dynamic: the scale of a block is that of what is rounded.

    `above` says where the float32 scale `g` comes from: the largest of each token's channels or of the whole tensor; or
    it is a number, as in checkpoints, where one is written for each linear. With a token's own, results depend neither
    on what else is in the batch nor on later tokens.

    Blocks run along the channels; the last one may be short. In attention the channels of a token are those of one
    head. The softmax output stays in float unless `softmax` asks otherwise.
    """

    block: int = Field(BLOCK, ge=1, description="channels that share an 8-bit scale, at least 1; 16 in hardware")
    above: Literal["token", "tensor"] | float = Field(
        "token", description="token, tensor, or the float32 scale itself, a number above 0 that divides block scales"
    )
    attention: bool = Field(False, description="true quantises queries, keys and values as well")
    softmax: bool = Field(False, description="true quantises the attention weights as well")

    bits, active, family, factors, number = 4, True, "nvfp", "fp8", "e2m1"

    def __post_init__(self) -> None:
        if not isinstance(self.above, str) and not 0 < self.above < float("inf"):
            raise ValueError(f"above={self.above}: a scale is a number above 0; use token, tensor or such a number")

    @property
    def suffix(self) -> str:
        if isinstance(self.above, str):
            return _suffix(self.block) + ("t" if self.above == "tensor" else "")
        return _suffix(self.block) + f"s{self.above:g}"

    @property
    def words(self) -> str:
        return f"4-bit floating point (e2m1), blocks of {self.block} channels with an e4m3 scale, under {self._shared}"

    @property
    def _shared(self) -> str:
        return f"one of float32 per {self.above}" if isinstance(self.above, str) else f"the fixed scale {self.above:g}"

    def fake(self, x: Tensor) -> Tensor:
        """Return `x (…, channels)` on its grid, in its own dtype; rounding lets gradients straight through."""
        blocks = in_blocks(x.float(), self.block)
        reach = blocks.detach().abs().amax(-1, keepdim=True)
        if self.above == "token":
            matrix = matrix_scale(reach.amax(-2, keepdim=True))
        elif self.above == "tensor":
            matrix = matrix_scale(reach.amax())
        else:
            matrix = reach.new_full((), self.above)
        scale = block_scale(reach, matrix) / matrix
        rounded = _NUMBER.round(blocks / scale) * scale
        return rounded.flatten(-2)[..., : x.shape[-1]].to(x.dtype)

    def fake_softmax(self, weights: Tensor) -> Tensor:
        """Return attention weights in 0 … 1 as the format holds them."""
        return self.fake(weights)


def matrix_scale(largest: Tensor) -> Tensor:
    """Return `g = 6 · 448 / largest`, or 1 where that is no float32 number."""
    scale = largest.reciprocal() * _LARGEST  # as torch divides a number by a tensor
    return scale.where(~scale.isinf(), 1.0)


def block_scale(reach: Tensor, matrix: Tensor) -> Tensor:
    """Return the e4m3 scale `b` of blocks with the largest magnitude `reach`, under the scale `matrix`."""
    return _SCALE.round(divided(reach, int(_NUMBER.largest)) * matrix).clamp(min=_SCALE.smallest)


def split_scale(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return `b`, of the shape of `scale`, and the scalar `g`, both float32, with `b / g == scale`, bit for bit.

    The largest block has one of the 126 numbers of e4m3, and then `g` is known but for its last digits; so all that is
    possible is tried, on the few different scales that there are.

    Raises:
        ValueError: there are no such numbers: the scales were changed after they had been found.
    """
    import torch

    different = scale.unique()
    numbers = sorted({number for number in _SCALE.numbers() if number > 0}, reverse=True)
    candidates = (different.new_tensor(numbers) / different.max())[:, None]
    steps = torch.arange(-2, 3, dtype=torch.int32, device=scale.device)
    matrix = (candidates.view(torch.int32) + steps).view(torch.float32).flatten()  # float32 numbers beside it
    block = _SCALE.round(different * matrix[:, None])
    fits = (block / matrix[:, None] == different).all(1).nonzero()
    if not len(fits):
        raise ValueError("these scales are no 8-bit numbers over one float32 number")
    tensor_scale = matrix[fits[0, 0]]
    return _SCALE.round(scale * tensor_scale), tensor_scale


def _suffix(block: int) -> str:
    return "nvfp4" + (f"b{block}" if block != BLOCK else "")
