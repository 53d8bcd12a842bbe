"""Dynamic rounding of activations, token by token, as operations that a compiler does not look into.

The plain version is `Activation.fake`; its formula is that of weights with one group a row and no clipping. A compiler
that fuses the search for a token's extremes with what made the token may not find the extremes again on the way back.
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
def fake_tokens(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Return `x (rows, channels)` with each row on its grid."""
    out = torch.empty_like(x)
    _rounding(bits, symmetric).forward(Matrix(x), out)
    return out


@torch.library.custom_op("lsiq::fake_tokens_gradient", mutates_args=())
def fake_tokens_gradient(x: Tensor, gradient: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Return the gradient of `x`, given that of what `fake_tokens` made of it."""
    out = torch.empty_like(x)
    _rounding(bits, symmetric).backward(Matrix(x), gradient, out)
    return out


@fake_tokens.register_fake
def _(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    return torch.empty_like(x)


@fake_tokens_gradient.register_fake
def _(x: Tensor, gradient: Tensor, bits: int, symmetric: bool) -> Tensor:
    return torch.empty_like(x)


def _rounding(bits: int, symmetric: bool) -> GroupRounding:
    return GroupRounding(fill(Integer, {"bits": bits, "group": None, "symmetric": symmetric}))


class _FakeTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, symmetric: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = bits, symmetric
        return fake_tokens(x, bits, symmetric)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return fake_tokens_gradient(*ctx.saved_tensors, gradient.contiguous(), *ctx.settings), None, None


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
        return _FakeTokens.apply(rows, self.plain.bits, self.plain.symmetric).view(x.shape)  # type: ignore[union-attr]

    def fake_softmax(self, weights: Tensor) -> Tensor:
        """Return attention weights in 0 … 1 on the fixed grid of `bits` bits."""
        return self.plain.fake_softmax(weights)
