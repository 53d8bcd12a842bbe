"""Rounding that lets gradients straight through, as one operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RoundThrough(torch.autograd.Function):
    # x + (round(x) - x).detach() gives the same in three operations, and learning a block is bound by their number.
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        del ctx
        return gradient


# From torch 2.14 on clamp passes no gradient where a number is an end of its range, as the largest of each group is. By
# the version and not by trying: this module may be imported first inside a step that is traced or checkpointed.
_ENDS_PASS = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)


def clip(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """Return `x` clamped to a range; its gradient passes where `x` lies in it, ends included."""
    clamped = x.clamp(low, high)
    return clamped if _ENDS_PASS else torch.where(clamped == x, x, clamped.detach())


def straight_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing had been rounded."""
    return _RoundThrough.apply(x)  # type: ignore[return-value]
