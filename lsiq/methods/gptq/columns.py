"""Rounding column by column, with each column's error fed back into those still to be rounded: the core of GPTQ.

With `H (in, in)` the damped Hessian in the order of the columns and `H⁻¹ = Uᵀ U`, `U` upper triangular:

    e_i = (w_i - ŵ_i) / U_ii          w_j ← w_j - e_i U_ij   for all j > i

which leaves the not yet rounded columns at the optimum of `tr((W - Ŵ) H (W - Ŵ)ᵀ)` given those that are.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lsiq.errors import NumericalError
from lsiq.formats.base import WeightFormat
from lsiq.formats.tensor import QuantizedTensor

Precision = Literal["auto", "float32", "float64"]
Kernels = Literal["triton", "plain"]


@dataclass(frozen=True)
class Curvature:
    """What the inputs say about the columns.

    Attributes:
        order: `(in,)`, the columns in the order in which they are rounded.
        factor: `U (in, in)`, upper triangular in that order; its dtype is that of the feedback.
    """

    order: Tensor
    factor: Tensor


def factorise(gram: Tensor, act_order: bool, damping: float, precision: Precision, where: str) -> Curvature:
    """Return the order of the columns and the factor of the inverse damped Hessian.

    Args:
        gram: `XᵀX / tokens (in, in)` in float64; the Hessian is twice that.
        act_order: the columns with the largest diagonal first.
        damping: `λ` as a share of the mean diagonal over the channels that live.
        precision: see `lsiq.methods.gptq.GPTQ`.
        where: block and linear, for messages.

    A dead channel (its diagonal is zero) gets curvature 1 and no coupling: it is rounded to nearest.

    Raises:
        NumericalError: the damped Hessian is not positive definite in the precision asked for.
    """
    hessian = 2 * gram
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(gram), device=gram.device)
    dead = diagonal == 0
    strength = damping * (diagonal.sum() / (~dead).sum().clamp(min=1)).item()
    diagonal += dead + strength
    if precision == "auto":
        precision = _enough(hessian, strength)
    hessian = hessian[order][:, order].to(getattr(torch, precision))
    # A = J H J turns rows and columns round, so its lower factor L, turned back, is the upper M with H = M Mᵀ; then
    # H⁻¹ = (M⁻¹)ᵀ M⁻¹. One factorisation and one triangular inverse, where inverting H first would take two.
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    factor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
    if failed.item() or not factor.isfinite().all():
        wider = " or precision=float64" if precision == "float32" else ""
        raise NumericalError(
            f"{where}: the Hessian is not positive definite in {precision} with damping={damping:g}; "
            f"try damping={max(10 * damping, 0.01):g}{wider}, or more calibration tokens"
        )
    return Curvature(order, factor)


def _enough(hessian: Tensor, strength: float) -> Precision:
    """The narrowest precision whose rounding error, `eps · ‖H‖₁ / λ` relative to the factor, stays under 1 %."""
    bound = torch.finfo(torch.float32).eps * hessian.abs().sum(0).max().item()
    return "float32" if bound < 0.01 * strength else "float64"


def choose_kernels(asked: Literal["auto", "plain"], w: Tensor, fmt: WeightFormat) -> Kernels:
    """Return what rounds the columns of `w`: with `auto` the Triton kernel on a GPU, where it covers the format."""
    if asked == "plain" or not w.is_cuda or importlib.util.find_spec("triton") is None:
        return "plain"
    from lsiq.kernels.columns import covers

    return "triton" if covers(fmt) else "plain"


def round_with_feedback(
    w: Tensor,
    curvature: Curvature,
    fmt: WeightFormat,
    static_groups: bool,
    block_size: int,
    kernels: Kernels = "plain",
) -> QuantizedTensor:
    """Return the codes of `w (out, in)`, in the original order of its columns.

    Args:
        static_groups: grids are fitted on `w` before anything is rounded; otherwise each group's on its weights as
            they stand when its first column is reached, which needs the original order.
        block_size: columns whose feedback into the rest is applied at once, as one product; changes the speed only.
            The Triton kernel takes no more than it can hold.
        kernels: what rounds the columns of a block.
    """
    round_block = round_in_turn
    if kernels == "triton":
        from lsiq.kernels.columns import MOST_COLUMNS, round_columns

        round_block, block_size = round_columns, min(block_size, MOST_COLUMNS)
    order, factor = curvature.order, curvature.factor
    width, group = w.shape[1], fmt.width or w.shape[1]
    columns = w.t()[order].to(factor.dtype)  # (in, out): a column is contiguous
    codes = torch.empty_like(columns, dtype=torch.uint8)
    scale, zero = fmt.fit(*fmt.extremes(w))
    start = 0
    while start < width:
        stop = min(start + block_size, width)
        if not static_groups:
            # Ending every step where a group ends, a group begins with all feedback applied to it.
            stop = min(stop, (start // group + 1) * group)
            if start % group == 0:
                current = columns[start : start + group].t().float()
                at = slice(start // group, start // group + 1)
                scale[:, at], zero[:, at] = fmt.fit_beside(*fmt.extremes(current), scale)
        belongs = order[start:stop] // group
        grid = (scale[:, belongs, 0].t().to(factor.dtype), zero[:, belongs, 0].t().to(factor.dtype))
        block_codes, errors = round_block(columns[start:stop], factor[start:stop, start:stop], grid, fmt)
        codes[start:stop] = block_codes
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
        start = stop
    original = torch.empty_like(codes)
    original[order] = codes
    return QuantizedTensor(original.t().contiguous(), scale, zero, fmt)


def round_in_turn(
    columns: Tensor, factor: Tensor, grid: tuple[Tensor, Tensor], fmt: WeightFormat
) -> tuple[Tensor, Tensor]:
    """Round `columns (n, out)` in turn, changing them; return their codes and errors `e`, both `(n, out)`.

    Args:
        factor: the part `(n, n)` of `U` that belongs to them.
        grid: scale and zero point of each of their weights, `(n, out)`, of the format `fmt`.
    """
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    for i, (column, scale, zero) in enumerate(zip(columns, *grid, strict=True)):
        codes[i] = fmt.nearest(column, scale, zero)
        errors[i] = (column - fmt.value(codes[i], scale, zero)) / factor[i, i]
        columns[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return codes, errors
