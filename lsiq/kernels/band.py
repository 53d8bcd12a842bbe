"""The core of the increments times the smaller singular factor: one kernel forward, one backward.

The core is a diagonal (LSI) or a band around it (SDE). The plain version is `lsiq.parts.expansion.Expansion._rows`.
A tile of rows of the core is not zero on few columns more than it has rows, so it is a small dense product.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (the body of a kernel is in Triton's language, which has no types)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of the core and columns of the factor at once: for a band, and for the diagonal alone.
TILE, COLUMNS = 32, 128
DIAGONAL_TILE, DIAGONAL_COLUMNS = 8, 512


@triton.jit
def _places(i, j, count, below, above, TRANSPOSED: tl.constexpr):
    """Return where entry `(i, j)` of the core (or of its transpose) lies: its row, and how far right of the diagonal.

    And whether it is in the lower, the main or the upper part.
    """
    row, column = (j, i) if TRANSPOSED else (i, j)
    row, column = tl.broadcast_to(row, (i + j).shape), tl.broadcast_to(column, (i + j).shape)
    right = column - row
    valid = (row >= 0) & (column >= 0) & (row < count) & (column < count)
    return (
        row,
        right,
        valid & (right < 0) & (right >= -below),
        valid & (right == 0),
        valid & (right > 0) & (right <= above),
    )


@triton.jit
def band_forward(
    factor_ptr, diagonal_ptr, lower_ptr, upper_ptr, out_ptr, height, width, count, scale, below, above,
    REACH: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr,
    BELOW: tl.constexpr, ABOVE: tl.constexpr,
):  # fmt: skip
    """Write `scale · core @ factor`; rows past `count` are 0."""
    tile = tl.program_id(0) * TILE
    i, c = tile + tl.arange(0, TILE), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (i < height)[:, None] & (c < width)[None, :]
    at = i.to(tl.int64)[:, None] * width + c[None, :]
    if REACH == 0:
        core = tl.load(diagonal_ptr + i, mask=i < count, other=0.0)[:, None] * scale
        product = core * tl.load(factor_ptr + at, mask=mask, other=0.0)
    else:
        j = tile - REACH + tl.arange(0, WINDOW)
        row, right, is_lower, is_main, is_upper = _places(i[:, None], j[None, :], count, below, above, TRANSPOSED)
        core = tl.load(diagonal_ptr + row, mask=is_main, other=0.0)
        if BELOW:
            core += tl.load(lower_ptr + row * below + below + right, mask=is_lower, other=0.0)
        if ABOVE:
            core += tl.load(upper_ptr + row * above + right - 1, mask=is_upper, other=0.0)
        window_mask = ((j >= 0) & (j < count))[:, None] & (c < width)[None, :]
        window = tl.load(factor_ptr + j.to(tl.int64)[:, None] * width + c[None, :], mask=window_mask, other=0.0)
        product = tl.dot((core * scale).to(window.dtype), window, input_precision="ieee")
    tl.store(out_ptr + at, product.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def band_backward(
    factor_ptr, gradient_ptr, diagonal_ptr, lower_ptr, upper_ptr, width, count, below, above,
    REACH: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr,
    BELOW: tl.constexpr, ABOVE: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the band's parts: its entries of `gradient @ factorᵀ`."""
    tile = tl.program_id(0) * TILE
    i = tile + tl.arange(0, TILE)
    c = tl.arange(0, BLOCK)
    if REACH == 0:
        total = tl.zeros([TILE, BLOCK], WORK)
        for start in range(0, width, BLOCK):
            mask = (i < count)[:, None] & (start + c < width)[None, :]
            at = i.to(tl.int64)[:, None] * width + start + c[None, :]
            gradient = tl.load(gradient_ptr + at, mask=mask, other=0.0).to(WORK)
            total += gradient * tl.load(factor_ptr + at, mask=mask, other=0.0).to(WORK)
        tl.store(diagonal_ptr + i, tl.sum(total, 1), mask=i < count)
    else:
        j = tile - REACH + tl.arange(0, WINDOW)
        core = tl.zeros([TILE, WINDOW], WORK)
        for start in range(0, width, BLOCK):
            columns = (start + c < width)[None, :]
            gradient = tl.load(gradient_ptr + i.to(tl.int64)[:, None] * width + start + c[None, :],
                               mask=(i < count)[:, None] & columns, other=0.0)  # fmt: skip
            window = tl.load(factor_ptr + j.to(tl.int64)[:, None] * width + start + c[None, :],
                             mask=((j >= 0) & (j < count))[:, None] & columns, other=0.0)  # fmt: skip
            core += tl.dot(gradient, tl.trans(window), input_precision="ieee").to(WORK)
        row, right, is_lower, is_main, is_upper = _places(i[:, None], j[None, :], count, below, above, TRANSPOSED)
        tl.store(diagonal_ptr + row, core, mask=is_main)
        if BELOW:
            tl.store(lower_ptr + row * below + below + right, core, mask=is_lower)
        if ABOVE:
            tl.store(upper_ptr + row * above + right - 1, core, mask=is_upper)


def core_times(
    factor: Tensor, diagonal: Tensor, lower: Tensor | None, upper: Tensor | None, scale: float, transposed: bool,
    out: Tensor,
) -> None:  # fmt: skip
    """Write `scale · core @ factor` to `out (height, width)`, the core transposed where that is asked for.

    Args:
        factor: `(height, width)`, contiguous; the core has `len(diagonal) ≤ height` rows, the rest is 0.
        lower, upper: `(len(diagonal), reach)` each, the core's rows left and right of the diagonal.
    """
    height, width = out.shape
    settings = _settings(lower, upper, transposed)
    grid = (triton.cdiv(height, settings["TILE"]), triton.cdiv(width, settings["BLOCK"]))  # type: ignore[operator]
    band_forward[grid](
        factor, diagonal, diagonal if lower is None else lower, diagonal if upper is None else upper, out, height,
        width, len(diagonal), scale, _reach(lower), _reach(upper), **settings,
    )  # fmt: skip


def core_gradients(
    factor: Tensor, gradient: Tensor, diagonal: Tensor, lower: Tensor | None, upper: Tensor | None, transposed: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of diagonal, lower and upper, given that of `core @ factor`."""
    settings = _settings(lower, upper, transposed)
    # Entries of the band outside the core have no gradient.
    gradients = [None if part is None else torch.zeros_like(part) for part in (diagonal, lower, upper)]
    places = [diagonal if part is None else part for part in gradients]
    work = tl.float64 if diagonal.dtype == torch.float64 else tl.float32
    band_backward[(triton.cdiv(len(diagonal), settings["TILE"]),)](
        factor, gradient, *places, factor.shape[1], len(diagonal), _reach(lower), _reach(upper), WORK=work, **settings
    )
    return gradients[0], gradients[1], gradients[2]  # type: ignore[return-value]


def _reach(part: Tensor | None) -> int:
    return 0 if part is None else part.shape[1]


def _settings(lower: Tensor | None, upper: Tensor | None, transposed: bool) -> dict[str, Any]:
    reach = max(_reach(lower), _reach(upper))
    tile, columns = (TILE, COLUMNS) if reach else (DIAGONAL_TILE, DIAGONAL_COLUMNS)
    return {
        "REACH": reach, "WINDOW": triton.next_power_of_2(tile + 2 * reach), "TILE": tile, "BLOCK": columns,
        "TRANSPOSED": transposed, "BELOW": lower is not None, "ABOVE": upper is not None,
    }  # fmt: skip
