"""Columns rounded one after the other, each with its error fed back into those that follow: one kernel for a block.

The plain version is `lsiq.methods.gptq.columns.round_in_turn`, whose operations these are, in the same order. One
program holds all columns of some rows in registers, for rows do not depend on each other.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# (the body of a kernel is in Triton's language, which has no types)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsiq.formats.base import WeightFormat
from lsiq.formats.grid import Grid
from lsiq.kernels.fakequant import _divide, _round

MOST_COLUMNS = 128  # of a block; more would leave registers for too few rows
TILE_BYTES = 8192  # of a program: 64 registers a thread, for it has one warp and so needs no barriers


@triton.jit
def round_block(
    columns_ptr, factor_ptr, scale_ptr, zero_ptr, codes_ptr, errors_ptr, count, height,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, LOWEST: tl.constexpr, LEVELS: tl.constexpr, MAGIC: tl.constexpr,
):  # fmt: skip
    """Write codes and errors of `count` columns, all matrices `(count, height)` but the factor `(count, count)`."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    inside = r < height
    at = j[:, None] * height + r[None, :]  # a block has far fewer than 2³¹ weights
    tile = tl.load(columns_ptr + at, mask=(j < count)[:, None] & inside[None, :], other=0.0)
    for i in range(count):
        place = i * height + r
        scale = tl.load(scale_ptr + place, mask=inside, other=1.0)
        zero = tl.load(zero_ptr + place, mask=inside, other=0.0)
        factor_row = tl.load(factor_ptr + i * count + j, mask=(j > i) & (j < count), other=0.0)
        w = tl.sum(tl.where((j == i)[:, None], tile, 0.0), 0)
        codes = _round(_divide(w, scale), MAGIC) + zero
        codes = tl.minimum(tl.maximum(codes, LOWEST), LEVELS)
        diagonal = tl.broadcast_to(tl.load(factor_ptr + i * count + i), w.shape)
        errors = _divide(w - (codes - zero) * scale, diagonal)
        tile -= factor_row[:, None] * errors[None, :]
        tl.store(codes_ptr + place, codes.to(tl.uint8), mask=inside)
        tl.store(errors_ptr + place, errors, mask=inside)


def covers(fmt: WeightFormat) -> bool:
    """Whether the kernel rounds to the format: its codes count equal steps, however the steps are found."""
    return type(fmt).nearest is Grid.nearest and type(fmt).value is Grid.value


def round_columns(
    columns: Tensor, factor: Tensor, grid: tuple[Tensor, Tensor], fmt: WeightFormat
) -> tuple[Tensor, Tensor]:
    """Return codes and errors, both `(n, out)`, of `columns (n, out)`, rounded in turn; `columns` stay as they are.

    Args:
        columns: at most `MOST_COLUMNS` of them, contiguous.
        factor: `(n, n)` upper triangular, of the dtype of the columns.
        grid: scale and zero point of each weight, `(n, out)`, of the format `fmt`.
    """
    count, height = columns.shape
    codes, errors = torch.empty_like(columns, dtype=torch.uint8), torch.empty_like(columns)
    scale, zero = (part.contiguous() for part in grid)
    width = max(16, triton.next_power_of_2(count))
    rows = max(1, TILE_BYTES // (width * columns.element_size()))
    round_block[(triton.cdiv(height, rows),)](
        columns, factor.contiguous(), scale, zero, codes, errors, count, height, COLUMNS=width, ROWS=rows,
        LOWEST=fmt.lowest, LEVELS=fmt.levels, MAGIC=1.5 * 2.0 ** (52 if columns.dtype == torch.float64 else 23),
        num_warps=1, enable_fp_fusion=False,  # products are rounded before they are subtracted, as torch does it
    )  # fmt: skip
    return codes, errors
