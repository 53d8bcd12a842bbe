"""Rounding to an integer grid with learned clipping: one kernel forward, one backward.

The plain version is `lsiq.parts.base.rounded` on a draft of `Dense` or `Singular`, `Equivalent`, `Clip` and `Rounding`.
A kernel works on tiles of whole groups: it makes `W' = rows · (W + P) · columns`, finds the extremes of each group,
clips, adds the offsets `V` in steps of the grid, rounds. The backward kernel makes all of that again from `W`, `P` and
`V`, so nothing else is kept in between.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# (the body of a kernel is in Triton's language, which has no types)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsiq.formats.base import WeightFormat
from lsiq.formats.integer import MAX_SCALE, MIN_SCALE, Integer

TILE = 1024  # elements of a tile, unless one group is wider: eight to a thread, which leaves registers for many tiles
ROWS_PER_SUM = 64  # rows whose gradients one program adds up for each column factor


@triton.jit
def _divide(x, y):
    # `/` on float32 is off by up to two units in the last place, and weights on a boundary would fall the other way.
    # In one expression: after a `return` Triton compiles `div_rn` for float64 too, which it does not take.
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def _in_steps(w, scale):
    """Return `w / scale`, exactly rounded, with one division for each group (Markstein)."""
    if w.dtype == tl.float64:
        steps = w / scale[:, None]
    else:
        step = tl.broadcast_to(scale[:, None], w.shape)
        inverse = tl.broadcast_to(tl.div_rn(tl.full(scale.shape, 1.0, scale.dtype), scale)[:, None], w.shape)
        near = w * inverse
        steps = tl.fma(tl.fma(-near, step, w), inverse, near)
    return steps


@triton.jit
def _round(x, MAGIC: tl.constexpr):
    # Half to even: nothing behind the point survives the addition. What is too large for it is clamped afterwards.
    return (x + MAGIC) - MAGIC


@triton.jit
def _changed(
    w_ptr, p_ptr, rows_ptr, columns_ptr, r, c, mask, height, width, unscale,
    PRODUCT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    """Return `W + P`, and what its rows and its columns are multiplied with."""
    at = r.to(tl.int64) * width + c
    base = tl.load(w_ptr + at, mask=mask, other=0.0).to(WORK)
    if PRODUCT:
        base += tl.load(p_ptr + at, mask=mask, other=0.0).to(WORK) * unscale
    rows, columns = tl.full(r.shape, 1.0, WORK), tl.full(c.shape, 1.0, WORK)
    if ROWS:
        rows = tl.load(rows_ptr + r, mask=r < height, other=0.0).to(WORK)
    if COLUMNS:
        columns = tl.load(columns_ptr + c, mask=c < width, other=0.0).to(WORK)
    return base, rows, columns


@triton.jit
def _factors(low_ptr, high_ptr, group, inside, CLIP: tl.constexpr, WORK: tl.constexpr):
    """Return what clipping multiplies the two ends of each group with."""
    if CLIP == 0:
        unity = tl.full(group.shape, 1.0, WORK)
        return unity, unity
    low = tl.load(low_ptr + group, mask=inside, other=0.0).to(WORK)
    high = tl.load(high_ptr + group, mask=inside, other=0.0).to(WORK)
    if CLIP == 1:
        low, high = 1.0 / (1.0 + tl.exp(-low)), 1.0 / (1.0 + tl.exp(-high))
    return low, high


@triton.jit
def _fit(
    lo, hi, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, HALF: tl.constexpr, MAGIC: tl.constexpr,
    LEAST: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Return scale, zero point and whether the scale lies within its bounds; as `Integer.fit`."""
    if SYMMETRIC:
        raw = _divide(tl.maximum(-lo, hi), tl.full(lo.shape, (LEVELS + 1) // 2 - 1, lo.dtype))
    else:
        raw = _divide(hi - lo, tl.full(lo.shape, LEVELS, lo.dtype))
    if HALF:
        raw = raw.to(tl.float16).to(lo.dtype)
    scale = tl.minimum(tl.maximum(raw, LEAST), LARGEST)
    if SYMMETRIC:
        zero = tl.full(lo.shape, (LEVELS + 1) // 2, lo.dtype)
    else:
        zero = tl.minimum(tl.maximum(_round(_divide(-lo, scale), MAGIC), 0.0), LEVELS)
    return tl.where(raw != raw, raw, scale), zero, (raw >= LEAST) & (raw <= LARGEST)


@triton.jit
def _offset(v_ptr, at, mask, w, scale, OFFSET: tl.constexpr):
    """Return what is rounded: the weights and their offsets, which count in steps of the grid."""
    if OFFSET:
        return w + tl.load(v_ptr + at, mask=mask, other=0.0).to(w.dtype) * scale[:, None]
    return w


@triton.jit
def fake_forward(
    w_ptr, p_ptr, v_ptr, rows_ptr, columns_ptr, low_ptr, high_ptr, out_ptr, height, width, unscale,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr, STEPS: tl.constexpr,
    PRODUCT: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CLIP: tl.constexpr,
    LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, HALF: tl.constexpr, WORK: tl.constexpr, MAGIC: tl.constexpr,
    LEAST: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    groups = width // GROUP
    j = tl.program_id(0) % groups
    r = (tl.program_id(0) // groups) * BLOCK_R + tl.arange(0, BLOCK_R)
    within = tl.arange(0, BLOCK_G)
    inside = r < height
    mask = inside[:, None] & (within < GROUP)[None, :]
    r2, c2 = r[:, None], (j * GROUP + within)[None, :]
    base, rows, columns = _changed(
        w_ptr, p_ptr, rows_ptr, columns_ptr, r2, c2, mask, height, width, unscale, PRODUCT, ROWS, COLUMNS, WORK
    )
    w = base * rows * columns
    low, high = _factors(low_ptr, high_ptr, r * groups + j, inside, CLIP, WORK)
    lo, hi = tl.min(w, 1), tl.max(w, 1)  # masked places hold 0, which is part of every range
    scale, zero, _ = _fit(low * tl.minimum(lo, 0.0), high * tl.maximum(hi, 0.0),
                          LEVELS, SYMMETRIC, HALF, MAGIC, LEAST, LARGEST)  # fmt: skip
    at = r2.to(tl.int64) * width + c2
    codes = _round(_in_steps(_offset(v_ptr, at, mask, w, scale, OFFSET), scale), MAGIC) + zero[:, None]
    codes = tl.minimum(tl.maximum(codes, 0.0), LEVELS)
    rounded = (codes - zero[:, None]) * scale[:, None]
    rounded = tl.where(w != w, w, rounded)  # what is not finite stays so, for the loss to show it
    tl.store(out_ptr + at, rounded.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _to_ends(
    grad, to_w, u, codes, zero, scale, lo, hi, free, LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Return the gradients of the two ends that scale and zero point are made of; `to_w` is what reaches the weights.

    With u = w / scale, codes = clamp(round(u + offset) + zero) and out = (codes - zero) · scale.
    """
    to_scale = tl.sum(grad * (codes - zero[:, None]) - to_w * u, 1)
    if SYMMETRIC:
        reach = tl.where(free, to_scale, 0.0) / ((LEVELS + 1) // 2 - 1)
        share = tl.where(hi > -lo, 1.0, tl.where(hi == -lo, 0.5, 0.0))
        to_hi, to_lo = reach * share, -reach * (1.0 - share)
    else:
        lost = tl.sum(grad - to_w, 1)  # the gradient of the zero point is -scale times this
        to_scale -= lost * (lo / scale)
        spread = tl.where(free, to_scale, 0.0) / LEVELS
        to_hi, to_lo = spread, lost - spread
    return to_lo, to_hi


@triton.jit
def _to_extremes(
    w, least, largest, to_lo, to_hi, low, high, mask, MASKED: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    """Return the gradient of the extremes as that of the weights that are the extremes, in equal parts."""
    at_least, at_largest = w == least[:, None], w == largest[:, None]
    if MASKED:
        at_least, at_largest = at_least & mask, at_largest & mask
    counts = tl.sum(tl.where(at_least, 1, 0) + tl.where(at_largest, 1 << 16, 0), 1)
    to_least = tl.where(least <= 0.0, to_lo * low, 0.0) / tl.maximum((counts & 0xFFFF).to(WORK), 1.0)
    to_largest = tl.where(largest >= 0.0, to_hi * high, 0.0) / tl.maximum((counts >> 16).to(WORK), 1.0)
    return tl.where(at_least, to_least[:, None], 0.0) + tl.where(at_largest, to_largest[:, None], 0.0)


@triton.jit
def fake_backward(
    w_ptr, p_ptr, v_ptr, rows_ptr, columns_ptr, low_ptr, high_ptr, grad_ptr,
    inner_ptr, v_grad_ptr, low_grad_ptr, high_grad_ptr, row_sum_ptr, column_sum_ptr, height, width, unscale,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr, STEPS: tl.constexpr,
    PRODUCT: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CLIP: tl.constexpr,
    INNER: tl.constexpr,
    LEVELS: tl.constexpr, SYMMETRIC: tl.constexpr, HALF: tl.constexpr, WORK: tl.constexpr, MAGIC: tl.constexpr,
    LEAST: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    groups = width // GROUP
    j = tl.program_id(0) % groups
    part = tl.program_id(0) // groups
    within = tl.arange(0, BLOCK_G)
    c = j * GROUP + within
    column_sum = tl.zeros([BLOCK_G], WORK)
    for step in range(STEPS):
        r = (part * STEPS + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = r < height
        mask = inside[:, None] & (within < GROUP)[None, :]
        r2, c2 = r[:, None], c[None, :]
        at = r2.to(tl.int64) * width + c2
        base, rows, columns = _changed(
            w_ptr, p_ptr, rows_ptr, columns_ptr, r2, c2, mask, height, width, unscale, PRODUCT, ROWS, COLUMNS, WORK
        )
        w = base * rows * columns
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(WORK)
        group = r * groups + j
        low, high = _factors(low_ptr, high_ptr, group, inside, CLIP, WORK)
        least, largest = tl.min(w, 1), tl.max(w, 1)
        lo0, hi0 = tl.minimum(least, 0.0), tl.maximum(largest, 0.0)
        lo, hi = low * lo0, high * hi0
        scale, zero, free = _fit(lo, hi, LEVELS, SYMMETRIC, HALF, MAGIC, LEAST, LARGEST)
        u = _in_steps(w, scale)
        offset = _in_steps(_offset(v_ptr, at, mask, w, scale, OFFSET), scale) if OFFSET else u
        wide = _round(offset, MAGIC) + zero[:, None]
        codes = tl.minimum(tl.maximum(wide, 0.0), LEVELS)
        unclipped = codes == wide
        to_w = tl.where(unclipped, grad, 0.0)
        if OFFSET:
            tl.store(v_grad_ptr + at, (to_w * scale[:, None]).to(v_grad_ptr.dtype.element_ty), mask=mask)
        to_lo, to_hi = _to_ends(grad, to_w, u, codes, zero, scale, lo, hi, free, LEVELS, SYMMETRIC)
        if CLIP:
            to_low, to_high = to_lo * lo0, to_hi * hi0
            if CLIP == 1:
                to_low, to_high = to_low * low * (1.0 - low), to_high * high * (1.0 - high)
            tl.store(low_grad_ptr + group, to_low, mask=inside)
            tl.store(high_grad_ptr + group, to_high, mask=inside)
        to_w += _to_extremes(w, least, largest, to_lo, to_hi, low, high, mask, BLOCK_G > GROUP, WORK)
        if INNER:
            tl.store(inner_ptr + at, (to_w * rows * columns).to(inner_ptr.dtype.element_ty), mask=mask)
        if ROWS:
            tl.store(row_sum_ptr + group, tl.sum(to_w * base * columns, 1), mask=inside)
        if COLUMNS:
            column_sum += tl.sum(to_w * base * rows, 0)
    if COLUMNS:
        tl.store(column_sum_ptr + part * width + c, column_sum, mask=within < GROUP)


def covers(fmt: WeightFormat) -> TypeGuard[Integer]:
    """Whether these kernels round to the format."""
    return isinstance(fmt, Integer) and fmt.bits <= 8


@dataclass(frozen=True)
class Matrix:
    """What one weight is made of, contiguous; None where a method leaves it out.

    Attributes:
        w: the float weight, `(out, in)`; product and offset are of its shape.
        product: what is added to it, times what `GroupRounding` divides by.
        offset: what is added before rounding, in steps of the grid.
        ends: the two factors of each group's range, or their logits, `(out, groups, 1)`.
        rows, columns: factors, `(out,)` and `(in,)`.
    """

    w: Tensor
    product: Tensor | None = None
    offset: Tensor | None = None
    ends: tuple[Tensor, Tensor] | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None

    def of(self, tensor: Tensor | None) -> Tensor:
        """Return a tensor, or something with an address in its place, which no kernel then reads."""
        return self.w if tensor is None else tensor


class Gradients(NamedTuple):
    """The gradients of what stands under the same names in `Matrix`."""

    ends: tuple[Tensor, Tensor] | None
    offset: Tensor | None
    rows: Tensor | None
    columns: Tensor | None


@dataclass(frozen=True)
class GroupRounding:
    """How one weight is rounded.

    Attributes:
        format: bits, group, symmetry and the width of stored scales.
        clip: the form of the learned ends, or None for the full range.
        unscale: what the product has to be multiplied with.
    """

    format: Integer
    clip: str | None = None
    unscale: float = 1.0

    def forward(self, matrix: Matrix, out: Tensor) -> None:
        """Write the rounded `rows · (w + product) · columns` to `out`."""
        m, (height, width) = matrix, matrix.w.shape
        settings = self._settings(m)
        low, high = m.ends or (m.w, m.w)
        grid = (triton.cdiv(height, settings["BLOCK_R"]) * (width // settings["GROUP"]),)
        fake_forward[grid](
            m.w, m.of(m.product), m.of(m.offset), m.of(m.rows), m.of(m.columns), low, high, out,
            height, width, self.unscale, **settings,
        )  # fmt: skip

    def backward(self, matrix: Matrix, gradient: Tensor, inner: Tensor | None) -> Gradients:
        """Return the gradients of ends, offset, rows and columns; write that of `w + product` to `inner`."""
        m, (height, width) = matrix, matrix.w.shape
        settings = self._settings(m)
        groups = width // settings["GROUP"]
        if m.columns is not None:
            settings["STEPS"] = max(1, ROWS_PER_SUM // settings["BLOCK_R"])
        parts = triton.cdiv(height, settings["BLOCK_R"] * settings["STEPS"])
        work = torch.float64 if settings["WORK"] == tl.float64 else torch.float32
        low, high = m.ends or (m.w, m.w)
        to_low, to_high = (torch.empty_like(low), torch.empty_like(high)) if m.ends else (m.w, m.w)
        to_offset = None if m.offset is None else torch.empty_like(m.offset)
        row_sums = None if m.rows is None else m.w.new_empty((height, groups), dtype=work)
        column_sums = None if m.columns is None else m.w.new_empty((parts, width), dtype=work)
        fake_backward[(parts * groups,)](
            m.w, m.of(m.product), m.of(m.offset), m.of(m.rows), m.of(m.columns), low, high, gradient,
            m.of(inner), m.of(to_offset), to_low, to_high, m.of(row_sums), m.of(column_sums),
            height, width, self.unscale, INNER=inner is not None, **settings,
        )  # fmt: skip
        return Gradients(
            (to_low, to_high) if m.ends else None,
            to_offset,
            None if row_sums is None else row_sums.sum(1),
            None if column_sums is None else column_sums.sum(0),
        )

    def _settings(self, m: Matrix) -> dict[str, Any]:
        double = m.w.dtype == torch.float64
        group = self.format.group or m.w.shape[1]
        block = triton.next_power_of_2(group)
        rows_at_once = max(1, TILE // block)
        half = self.format.scale == "float16"
        return {
            "GROUP": group, "BLOCK_G": block, "BLOCK_R": rows_at_once, "STEPS": 1,
            "PRODUCT": m.product is not None, "OFFSET": m.offset is not None,
            "ROWS": m.rows is not None, "COLUMNS": m.columns is not None,
            "CLIP": {None: 0, "sigmoid": 1, "linear": 2}[self.clip],
            "LEVELS": self.format.levels, "SYMMETRIC": self.format.symmetric, "HALF": half,
            "WORK": tl.float64 if double else tl.float32, "MAGIC": 1.5 * 2.0 ** (52 if double else 23),
            "LEAST": 2.0**-24 if half else MIN_SCALE, "LARGEST": 65504.0 if half else MAX_SCALE,
            "num_warps": max(4, min(32, rows_at_once * block // 256)),
        }  # fmt: skip
