"""Singular (LSI): learnable increments of the singular values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from lsiq.errors import ConfigError
from lsiq.parts.base import Draft, PartState, PartTraits
from lsiq.runtime.processes import divided
from lsiq.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lsiq.formats.quant import QuantSettings
    from lsiq.models.block import Block
    from lsiq.models.context import Context


# Increments are small against the singular vectors' entries; scaled by this inside a half-precision product they keep
# their digits (4e-4 relative error at |I| = 1e-6 in float16, against 0.21 without).
HALF_SCALE = 4096.0


def _corner(value: int | float | str) -> int | float | str:
    if isinstance(value, str) and value not in ("full", "complete"):
        raise ValueError("no such size of a corner")
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError("a share of the rank lies above 0 and up to 1, and a size is a whole number")
    if isinstance(value, int) and value < 0:
        raise ValueError("a size is 0 or more")
    return value


@settings
class Singular(PartTraits):
    """Learnable singular value increments: `W' = W + U diag(I) Vᵀ`, with `W = U diag(S) Vᵀ` decomposed once.

    Only `I` is trained; it starts at 0, so the start is exact whatever the decomposition's error, and the increment
    product may run in half precision beside a float32 `W`. The grid follows `W'`, so `I` moves it too. With `corner`,
    a dense `(c, c)` block in the directions of the `c` largest singular values is trained as well. The result is an
    ordinary grid: nothing is left to do at inference.

    With `unit=step` the increments of a linear are scaled so that one rate suits every width, every size of the weights
    and every corner: when all `n` trained entries of its core move by `r`, its weights `(out, in)` move by `r` steps of
    their grid, root mean square. One unit is then `h · √(out · in / n)`, with `h` the mean step of the float weights.

    Source: LSI (arXiv 2406.16299). Its text leaves open which linears are trained and whether the fold comes first;
    here the order of the parts in a method says what comes first.
    """

    lr: float | None = Field(
        gt=0, description="learning rate of the increments, above 0; null: travel / steps, of 16 at least"
    )
    travel: float = Field(
        1.0, gt=0, description="with lr=null: how far an increment goes in steps that all point one way"
    )
    unit: Literal["value", "step"] = Field(
        "value", description="what the rate counts in: value (of the singular values), or step (of the weights' grid)"
    )
    corner: Annotated[int | float | str, AfterValidator(_corner)] = Field(
        description="the dense block of the largest singular directions: its size, a share of the rank such as 0.5, "
        "full (all of the rank) or complete (those of no singular value too); 0 for none",
    )
    top: int | None = Field(None, ge=1, description="train only the increments of the largest values; null for all")
    linears: list[str] | None = Field(
        None, description="names of linears such as self_attn.q_proj or mlp.down_proj; null for all"
    )
    directions: Literal["singular", "random"] = Field(
        "singular", description="singular, or random orthonormal directions (the control)"
    )
    product: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="precision of the increment product: auto (that of training on a GPU, float32 on a CPU), float32, "
        "bfloat16 or float16",
    )

    @property
    def name(self) -> str:
        return "singular" if self.directions == "singular" else "random"

    def start(self, block: Block, quant: QuantSettings, context: Context) -> PartState:
        return self._in_units(self._at_rest(block, context), block, quant)

    def _at_rest(self, block: Block, context: Context) -> PartState:
        """Return the directions of every linear and its core of zeros."""
        from lsiq.linalg.svd import completed, factors, random_directions

        parameters: dict[str, Tensor] = {}
        constants: dict[str, Tensor] = {}
        names = self._names(block)
        decompositions = {}
        if self.directions == "singular":
            sizes = {name: block.weights[name].numel() for name in names}
            device = block.device
            decompositions = divided(sizes, lambda name: factors(block.weights[name], context.cache), device)
        for name in names:
            u, s, vh = decompositions.get(name) or random_directions(block.weights[name], context.generator)
            parameters[f"{name}:increment"] = s.new_zeros(min(self.top or len(s), len(s)))
            if self.corner == "complete":
                u, vh = completed(u), completed(vh.T).T.contiguous()
                parameters[f"{name}:corner"] = s.new_zeros(u.shape[1], len(vh))
            elif c := self.corner_size(len(s)):
                parameters[f"{name}:corner"] = s.new_zeros(c, c)
            constants |= {f"{name}:u": u, f"{name}:s": s, f"{name}:vh": vh}
        return PartState(parameters, constants)

    def corner_size(self, rank: int) -> int:
        """How many of the `rank` directions of a linear the corner spans; a share is rounded up."""
        if isinstance(self.corner, str):
            return rank
        return min(self.corner, rank) if isinstance(self.corner, int) else math.ceil(self.corner * rank)

    def _in_units(self, state: PartState, block: Block, quant: QuantSettings) -> PartState:
        """Return the state with its left directions scaled, so that increments count in steps of the grid."""
        if self.unit == "value":
            return state
        constants = dict(state.constants)
        for name in self._names(block):
            if (fmt := quant.of(name)).bits == 16:
                continue
            w = block.weights[name]
            step = fmt.mean_steps(w).mean()
            trained = sum(p.numel() for key, p in state.parameters.items() if key.startswith(f"{name}:"))
            unit = step * math.sqrt(w.numel() / trained)
            constants |= {f"{name}:unit": unit, f"{name}:u": constants[f"{name}:u"] * unit}
        return replace(state, constants=constants)

    def apply(self, draft: Draft, state: PartState, block: Block) -> Draft:
        weights = dict(draft.weights)
        for name in self._names(block):
            weights[name] = weights[name] + self._update(state, name, self.product_dtype(block))
        return replace(draft, weights=weights)

    def product_dtype(self, block: Block) -> torch.dtype:
        """Return the type in which the increments of a block are multiplied."""
        import torch

        if self.product != "auto":
            return getattr(torch, self.product)
        weight = next(iter(block.weights.values()))
        return block.dtype if weight.is_cuda and block.dtype.itemsize == 2 else weight.dtype

    def directions_used(self, state: PartState, name: str) -> int:
        """How many singular directions of a linear are trained, by increments or in the corner."""
        corner = state.parameters.get(f"{name}:corner")
        return max(len(state.parameters[f"{name}:increment"]), 0 if corner is None else len(corner))

    def _update(self, state: PartState, name: str, dtype: torch.dtype) -> Tensor:
        """Return `U (core) Vᵀ (out, in)`: one product, over only the directions that are trained."""

        rows = self._with_corner(self._rows(state, name, dtype), state.constants[f"{name}:vh"], state, name)
        u = state.constants[f"{name}:u"][:, : len(rows)]
        if dtype.itemsize > 2:
            return u @ rows
        return (u.to(dtype) @ (rows * HALF_SCALE).to(dtype)).float() / HALF_SCALE

    def _rows(self, state: PartState, name: str, dtype: torch.dtype) -> Tensor:
        """Return the core without its corner, times `Vᵀ`: `(trained directions, in)`."""
        del dtype
        increment = state.parameters[f"{name}:increment"]
        return increment[:, None] * state.constants[f"{name}:vh"][: len(increment)]

    def change_times(self, state: PartState, name: str, vector: Tensor) -> Tensor:
        """Return `U (core) Vᵀ x` for a vector `(in,)`, without the product that the change itself would take."""
        directions = state.constants[f"{name}:vh"] @ vector
        inner = self._core_times(state, name, directions)
        inner = self._with_corner(inner[:, None], directions[:, None], state, name)[:, 0]
        return state.constants[f"{name}:u"][:, : len(inner)] @ inner

    def _with_corner(self, rows: Tensor, right: Tensor, state: PartState, name: str) -> Tensor:
        """Return the core times `right (rank, n)`, `(trained directions, n)`, where `rows` lack the corner's share."""
        import torch

        if (corner := state.parameters.get(f"{name}:corner")) is None:
            return rows
        c = len(corner)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, max(c - len(rows), 0)))
        return torch.cat([rows[:c] + corner @ right[: corner.shape[1]], rows[c:]])

    def _core_times(self, state: PartState, name: str, directions: Tensor) -> Tensor:
        """Return the core without its corner times a vector `(rank,)`: `(trained directions,)`."""
        increment = state.parameters[f"{name}:increment"]
        return increment * directions[: len(increment)]

    def core_square(self, parameters: Mapping[str, Tensor], name: str) -> Tensor:
        """The core's sum of squares, which is also that of the weight's change, for `U` and `V` are orthonormal."""
        increment, corner = parameters[f"{name}:increment"], parameters.get(f"{name}:corner")
        square = increment.square().sum()
        if corner is not None:
            c = min(len(corner), len(increment))
            square = square + corner.square().sum() + 2 * (corner.diagonal()[:c] * increment[:c]).sum()
        return square

    def _names(self, block: Block) -> tuple[str, ...]:
        if self.linears is None:
            return block.linears
        unknown = set(self.linears) - set(block.spec.linears)
        if unknown:
            raise ConfigError(
                f"{self.name}.linears: {block.spec.model_type} has no {', '.join(sorted(unknown))}; "
                f"there are {', '.join(block.spec.linears)}"
            )
        return tuple(name for name in block.linears if name.removesuffix(".weight") in self.linears)
