"""A block's rounded weights from its parameters, stack by stack, with the Triton kernels.

Linears of one stage and shape form a stack (queries, keys and values; gate and up), whose increment products are one
batched product. Weights and factors lie in two bytes where that is exact or asked for; what the backward pass keeps is
the product alone, which it overwrites, and changes of weights that shifts are multiplied with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsiq.kernels.band import core_gradients, core_times
from lsiq.kernels.fakequant import GroupRounding, Matrix, covers
from lsiq.parts.base import Draft, Part, PartState
from lsiq.parts.clip import Clip
from lsiq.parts.dense import Dense
from lsiq.parts.equivalent import Equivalent
from lsiq.parts.rounding import Rounding
from lsiq.parts.singular import HALF_SCALE, Singular

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings
    from lsiq.models.block import Block


# Two counts of a group's weights share one 32-bit number.
LARGEST_GROUP = 2**15


class Scaled:
    """A weight that is only multiplied: what its rows and its columns have been multiplied with so far.

    Attributes:
        times: what the weight makes of a vector `(in,)` before any of that, which folding a shift asks for.
    """

    def __init__(
        self,
        shape: torch.Size,
        times: Callable[[Tensor], Tensor],
        rows: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> None:
        self.shape, self.times, self.rows, self.columns = shape, times, rows, columns

    def dim(self) -> int:
        return 2

    def __mul__(self, factor: Tensor) -> Scaled:
        if factor.dim() == 2:
            rows = factor[:, 0]
            return Scaled(self.shape, self.times, rows if self.rows is None else self.rows * rows, self.columns)
        return Scaled(self.shape, self.times, self.rows, factor if self.columns is None else self.columns * factor)

    def __truediv__(self, factor: Tensor) -> Scaled:
        return self * (1 / factor)

    def __matmul__(self, vector: Tensor) -> Tensor:
        out = self.times(vector if self.columns is None else self.columns * vector)
        return out if self.rows is None else self.rows * out


class MatrixParameters(NamedTuple):
    """What is learned of one matrix; None where a method leaves it out."""

    diagonal: Tensor | None = None
    lower: Tensor | None = None
    upper: Tensor | None = None
    corner: Tensor | None = None
    change: Tensor | None = None
    offset: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None

    def matrix(self, weight: Tensor, product: Tensor | None) -> Matrix:
        """Return what the matrix is made of; a product of increments of singular values stands for the change."""
        ends = None if self.low is None or self.high is None else (self.low, self.high)
        return Matrix(weight, self.change if product is None else product, self.offset, ends, self.rows, self.columns)


# Those of them that the product is made of.
CORE = 4


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape `(out, in)` that are made together.

    Attributes:
        names: of the weights.
        weights: the float weights, in the narrowest type that holds them exactly.
        large: `(n, max(out, in), k)`, the larger factors; None where no increments are trained.
        small: `(n, k, min(out, in))`, the smaller ones, by direction.
        transposed: the smaller factor is `Uᵀ` and the core acts on it transposed.
        rounding: how the matrices are rounded.
        dtype: of what comes out.
    """

    names: tuple[str, ...]
    weights: Sequence[Tensor]
    large: Tensor | None
    small: Tensor | None
    transposed: bool
    rounding: GroupRounding
    dtype: torch.dtype

    def product(self, learned: Sequence[MatrixParameters]) -> Tensor | None:
        """Return the increments `U (core) Vᵀ`, times what keeps them in the range of their type, `(n, out, in)`."""
        if self.large is None or self.small is None:
            return None
        scale = 1 / self.rounding.unscale
        inner = torch.empty_like(self.small)
        for factor, product, p in zip(self.small, inner, learned, strict=True):
            assert p.diagonal is not None
            core_times(factor, p.diagonal, p.lower, p.upper, scale, self.transposed, product)
            if p.corner is not None:
                c = len(p.corner)
                corner = (self._transposed(p.corner) * scale).to(factor.dtype)
                product[:c].addmm_(corner, factor[:c])
        return self._transposed(inner) @ self._transposed(self.large) if self.transposed else self.large @ inner

    def product_gradients(
        self, gradient: Tensor, learned: Sequence[MatrixParameters]
    ) -> Iterator[tuple[Tensor | None, ...]]:
        """Yield the gradients of diagonal, lower, upper and corner of each matrix, given that of the product."""
        assert self.large is not None
        assert self.small is not None
        # What Uᵀ G Vᵀ would be is never made: one product to the smaller side, then what the core touches of it.
        inner = self.large.transpose(1, 2) @ self._transposed(gradient)
        for factor, to_inner, p in zip(self.small, inner, learned, strict=True):
            assert p.diagonal is not None
            corner = None
            if p.corner is not None:
                c = len(p.corner)
                corner = self._transposed(to_inner[:c] @ factor[:c].t()).to(p.corner.dtype)
            yield *core_gradients(factor, to_inner, p.diagonal, p.lower, p.upper, self.transposed), corner

    def _transposed(self, matrix: Tensor) -> Tensor:
        return matrix.transpose(-1, -2) if self.transposed else matrix


class _Rounded(torch.autograd.Function):
    """The rounded matrices of a stack."""

    @staticmethod
    def forward(ctx: Any, stack: Stack, *flat: Tensor | None) -> tuple[Tensor, ...]:
        learned = _by_matrix(flat)
        product = stack.product(learned)
        out = torch.empty(
            (len(stack.names), *stack.weights[0].shape), dtype=stack.dtype, device=stack.weights[0].device
        )
        for i, (w, p) in enumerate(zip(stack.weights, learned, strict=True)):
            stack.rounding.forward(p.matrix(w, None if product is None else product[i]), out[i])
        ctx.stack, ctx.product = stack, product
        ctx.save_for_backward(*flat)
        return tuple(out.unbind(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        stack, product, learned = ctx.stack, ctx.product, _by_matrix(ctx.saved_tensors)
        ctx.product = None  # overwritten with its gradient
        by_weight = []
        for i, (w, p, gradient) in enumerate(zip(stack.weights, learned, gradients, strict=True)):
            change = None if p.change is None else torch.empty_like(p.change)
            matrix = p.matrix(w, None if product is None else product[i])
            to = stack.rounding.backward(matrix, gradient.contiguous(), change if product is None else product[i])
            low, high = to.ends or (None, None)
            by_weight.append(
                MatrixParameters(change=change, offset=to.offset, low=low, high=high, rows=to.rows, columns=to.columns)
            )
        if product is not None:
            cores = stack.product_gradients(product, learned)
            by_weight = [
                MatrixParameters._make([*core, *parameters[CORE:]])
                for parameters, core in zip(by_weight, cores, strict=True)
            ]
        return None, *(gradient for parameters in by_weight for gradient in parameters)


def _by_matrix(flat: Sequence[Tensor | None]) -> list[MatrixParameters]:
    step = len(MatrixParameters._fields)
    return [MatrixParameters(*flat[i : i + step]) for i in range(0, len(flat), step)]


class FusedWeights:
    """Makes the weights of one block; `uncovered` says beforehand whether the kernels can."""

    def __init__(self, parts: Sequence[Part], states: Sequence[PartState], block: Block, quant: QuantSettings) -> None:
        self.block, self.quant = block, quant
        self.parts = dict(zip((_kind(part) for part in parts), zip(parts, states, strict=True), strict=True))
        self.stacks = list(self._stacks())

    def weights(self) -> dict[str, Tensor]:
        """Return every tensor of the block at the present parameters, its linears on their grids."""
        changes = self._changes()
        scaled = {
            name: Scaled(self.block.weights[name].shape, partial(self._times, name, changes.get(name)))
            for name in self.block.linears
        }
        draft = Draft({**self.block.weights, **scaled})  # type: ignore[dict-item]
        if Equivalent in self.parts:
            part, state = self.parts[Equivalent]
            draft = part.apply(draft, state, self.block)
        weights = {name: tensor for name, tensor in draft.weights.items() if isinstance(tensor, Tensor)}
        for stack in self.stacks:
            learned = [self._learned(name, draft.weights[name], changes.get(name)) for name in stack.names]  # type: ignore[arg-type]
            rounded = _Rounded.apply(stack, *(tensor for parameters in learned for tensor in parameters))
            weights |= zip(stack.names, rounded, strict=True)  # type: ignore[arg-type]
        return weights

    def _changes(self) -> dict[str, Tensor]:
        """Return what is added to the weights themselves, by name; empty where their increments are of another kind."""
        if Dense not in self.parts:
            return {}
        part, state = self.parts[Dense]
        return {name: part.change(state, name) for name in self.block.linears}  # type: ignore[attr-defined]

    def _learned(self, name: str, scaled: Scaled, change: Tensor | None = None) -> MatrixParameters:
        core = self._parameters(Singular)
        ends = self._parameters(Clip)
        return MatrixParameters(
            diagonal=core.get(f"{name}:increment"),
            lower=core.get(f"{name}:lower"),
            upper=core.get(f"{name}:upper"),
            corner=core.get(f"{name}:corner"),
            change=change,
            offset=self._parameters(Rounding).get(name),
            low=ends.get(f"{name}:low"),
            high=ends.get(f"{name}:high"),
            rows=scaled.rows,
            columns=scaled.columns,
        )

    def _times(self, name: str, change: Tensor | None, vector: Tensor) -> Tensor:
        """Return what a linear with its learned change makes of a vector `(in,)`, before scales and rounding."""
        out = self.block.weights[name] @ vector
        if f"{name}:increment" in self._parameters(Singular):
            part, state = self.parts[Singular]
            out = out + part.change_times(state, name, vector)  # type: ignore[attr-defined]
        return out if change is None else out + change @ vector

    def _parameters(self, kind: type) -> dict[str, Tensor]:
        return self.parts[kind][1].parameters if kind in self.parts else {}

    def _stacks(self) -> Iterator[Stack]:
        for stage in self.block.spec.stages:
            alike: dict[tuple[object, ...], list[str]] = {}
            for name in (f"{linear}.weight" for linear in stage):
                increment = self._parameters(Singular).get(f"{name}:increment")
                if name in self.block.untouched:
                    continue
                shape = None if increment is None else increment.shape
                key = (self.block.weights[name].shape, self.quant.of(name), shape)
                alike.setdefault(key, []).append(name)
            yield from (self._stack(tuple(names)) for names in alike.values())

    def _stack(self, names: tuple[str, ...]) -> Stack:
        weights = [self.block.weights[name] for name in names]
        out, width = weights[0].shape
        clip = self.parts[Clip][0].form if Clip in self.parts else None  # type: ignore[attr-defined]
        rounding = GroupRounding(self.quant.of(names[0]), clip)  # type: ignore[arg-type]
        large = small = None
        if f"{names[0]}:increment" in self._parameters(Singular):
            part, state = self.parts[Singular]
            dtype = part.product_dtype(self.block)  # type: ignore[attr-defined]
            rounding = replace(rounding, unscale=1 / HALF_SCALE if dtype.itemsize == 2 else 1.0)
            k = part.directions_used(state, names[0])  # type: ignore[attr-defined]
            us = [state.constants[f"{name}:u"][:, :k].to(dtype) for name in names]
            vs = [state.constants[f"{name}:vh"][:k].to(dtype) for name in names]
            large, small = (vs, us) if out < width else (us, vs)
            large = torch.stack([v.t() for v in large] if out < width else large)
            small = torch.stack([u.t() for u in small] if out < width else small)
        return Stack(names, [narrowest(w) for w in weights], large, small, out < width, rounding, self.block.dtype)


def narrowest(w: Tensor) -> Tensor:
    """Return `w`, contiguous, in two bytes where that holds each of its values exactly, as with most checkpoints."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(w.to(dtype).to(w.dtype), w):
            return w.to(dtype).contiguous()
    return w.contiguous()


def _kind(part: Part) -> type:
    return Singular if isinstance(part, Singular) else type(part)


def uncovered(parts: Sequence[Part], states: Sequence[PartState], block: Block, quant: QuantSettings) -> str | None:
    """Why the kernels cannot make these weights, or None where they can."""
    if not all(covers(quant.of(name)) for name in block.linears):
        return "they round to integers of 2 to 8 bits"
    order = [Dense, Singular, Equivalent]
    kinds = [_kind(part) for part, state in zip(parts, states, strict=True) if state.parameters]
    acting = [kind for kind in kinds if kind not in (Clip, Rounding)]  # these act on the grid, whatever stands before
    if any(kind not in order for kind in acting) or acting != sorted(acting, key=order.index):
        return "they cover the parts dense, singular or expansion, equivalent, in this order, clip and rounding"
    if Dense in kinds and Singular in kinds:
        return "they add increments of weights or of singular values, not both"
    if any(isinstance(part, Dense) and part.tensors == "all" for part in parts):
        return "they change linears alone, so dense.tensors=linears"
    if any(part.hardening for part in parts):
        return "they round from the first step on, so hardening=0 of rounding and dense"
    corners = [p for state in states for name, p in state.parameters.items() if name.endswith(":corner")]
    if any(corner.shape[0] != corner.shape[1] for corner in corners):
        return "their corners are square, so corner=full and not complete"
    if any(isinstance(part, Clip) and part.span == "start" for part in parts):
        return "their grids follow the changed weights, so span=present and not start"
    widest = max(quant.of(name).width or block.weights[name].shape[1] for name in block.linears)
    if widest >= LARGEST_GROUP:
        return f"their groups are narrower than {LARGEST_GROUP}"
    return None
