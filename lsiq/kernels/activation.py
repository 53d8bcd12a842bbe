"""Dynamic rounding of activations, token by token, as operations that a compiler does not look into.

The plain version is `Activation.fake`; its formula is that of weights with one group a row, both of whose ends are
multiplied by `clip`. A compiler that fuses the search for a token's extremes with what made the token may not find the
extremes again on the way back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsiq.formats.activation import Activation
from lsiq.formats.integer import Integer
from lsiq.kernels.fakequant import GroupRounding, Matrix
from lsiq.settings import fill


@torch.library.custom_op("lsiq::fake_tokens", mutates_args=())
def fake_tokens(x: Tensor, bits: int, symmetric: bool, clip: float) -> Tensor:
    """Return `x (rows, channels)` with each row on its grid."""
    out = torch.empty_like(x)
    _rounding(bits, symmetric, clip).forward(_tokens(x, clip), out)
    return out


@torch.library.custom_op("lsiq::fake_tokens_gradient", mutates_args=())
def fake_tokens_gradient(x: Tensor, gradient: Tensor, bits: int, symmetric: bool, clip: float) -> Tensor:
    """Return the gradient of `x`, given that of what `fake_tokens` made of it."""
    out = torch.empty_like(x)
    _rounding(bits, symmetric, clip).backward(_tokens(x, clip), gradient, out)
    return out


@fake_tokens.register_fake
def _(x: Tensor, bits: int, symmetric: bool, clip: float) -> Tensor:
    return torch.empty_like(x)


@fake_tokens_gradient.register_fake
def _(x: Tensor, gradient: Tensor, bits: int, symmetric: bool, clip: float) -> Tensor:
    return torch.empty_like(x)


def _rounding(bits: int, symmetric: bool, clip: float) -> GroupRounding:
    fmt = fill(Integer, {"bits": bits, "group": None, "symmetric": symmetric})
    return GroupRounding(fmt, clip=None if clip == 1 else "linear")


def _tokens(x: Tensor, clip: float) -> Matrix:
    if clip == 1:
        return Matrix(x)
    share = x.new_full((len(x), 1, 1), clip, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return Matrix(x, ends=(share, share))


class _FakeTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, symmetric: bool, clip: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = bits, symmetric, clip
        return fake_tokens(x, bits, symmetric, clip)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return fake_tokens_gradient(*ctx.saved_tensors, gradient.contiguous(), *ctx.settings), None, None, None


@dataclass(frozen=True)
class FusedActivation:
    """An activation format whose rounding is one kernel."""

    plain: Activation

    @property
    def active(self) -> bool:
        return self.plain.active

    @property
    def attention(self) -> bool:
        return self.plain.attention

    @property
    def softmax(self) -> bool:
        return self.plain.softmax

    def fake(self, x: Tensor) -> Tensor:
        """Return `x (…, channels)` on its grid, in its own dtype; rounding lets gradients straight through."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        settings = self.plain.bits, self.plain.symmetric, self.plain.clip
        return _FakeTokens.apply(rows, *settings).view(x.shape)  # type: ignore[union-attr]

    def fake_softmax(self, weights: Tensor) -> Tensor:
        """Return attention weights in 0 … 1 on the fixed grid of `bits` bits."""
        return self.plain.fake_softmax(weights)
