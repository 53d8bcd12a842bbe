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


def _itself(x: Tensor) -> Tensor:
    return x


def _ends_pass() -> bool:
    x = torch.ones((), requires_grad=True)
    # The first use may lie in a checkpointed step, which would be run again to unpack what this backward pass saved.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
        (gradient,) = torch.autograd.grad(x.clamp(0, 1), x)
    return bool(gradient)


# From torch 2.14 on clamp passes no gradient where a number is an end of its range, as the largest of each group is.
_ENDS_PASS = _ends_pass()


def clip(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """Return `x` clamped to a range; its gradient passes where `x` lies in it, ends included."""
    clamped = x.clamp(low, high)
    return clamped if _ENDS_PASS else torch.where(clamped == x, x, clamped.detach())


def straight_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing had been rounded."""
    return _RoundThrough.apply(x)  # type: ignore[return-value]
