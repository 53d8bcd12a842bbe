"""Expansion (SDE): the diagonal of singular value increments widened to a band."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.parts.base import PartState
from lsiq.parts.singular import HALF_SCALE, Singular
from lsiq.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lsiq.models.block import Block
    from lsiq.models.context import Context


# Rows of the core that are multiplied at once. The weight path at width 8 against LSI's, on one CPU core, for 16, 32,
# 64 and 128 rows: 1.16, 1.21, 1.40, 1.57 on a block of tiny-llama, 1.06, 1.05, 1.07, 1.17 on weights of 1024 x 1024.
_TILE = 32


@settings
class Expansion(Singular):
    """Singular value diagonal expansion: `W' = W + U B Vᵀ` with a band `B` of trainable diagonals `-width … width`.

    All diagonals start at 0. With `width=0` this is `Singular`, bit for bit; `corner`, `top`, `linears` and the rest
    mean what they mean there. `B Vᵀ` is made tile by tile: `t` rows of `B` are not zero on `t + 2 · width` columns
    only, so it costs about `(t + 2 · width) / out` of the product with `U`.

    Source: SDE (arXiv 2407.15508). Its text leaves open the width and whether both sides are trained.
    """

    width: int = Field(1, ge=0, description="diagonals beside the main one that are trained; 0 is LSI")
    sides: Literal["both", "upper", "lower"] = Field("both", description="both, upper or lower: where they lie")

    @property
    def name(self) -> str:
        return "expansion" if self.directions == "singular" else "random"

    def _at_rest(self, block: Block, context: Context) -> PartState:
        import torch

        state = super()._at_rest(block, context)
        if not self.width:
            return state
        parameters, constants = dict(state.parameters), dict(state.constants)
        for name in self._names(block):
            increment, vh = parameters[f"{name}:increment"], constants[f"{name}:vh"]
            rows = len(increment)
            for side, width in zip(("lower", "upper"), self._reach, strict=True):
                if width:
                    parameters[f"{name}:{side}"] = increment.new_zeros(rows, width)
            below, above = self._reach
            padded = torch.nn.functional.pad(vh[:rows], (0, 0, below, above + -rows % _TILE))
            constants[f"{name}:padded"] = padded
            if rows == len(vh):
                constants[f"{name}:vh"] = padded[below : below + rows]  # the same memory
        return replace(state, parameters=parameters, constants=constants)

    @property
    def _reach(self) -> tuple[int, int]:
        """How many diagonals are trained below and above the main one."""
        return (0 if self.sides == "upper" else self.width), (0 if self.sides == "lower" else self.width)

    def _rows(self, state: PartState, name: str, dtype: torch.dtype) -> Tensor:
        """Return `B Vᵀ (trained directions, in)`; row `i` mixes the directions `i - width … i + width`."""
        import torch

        if not self.width:
            return super()._rows(state, name, dtype)
        band = self._band(state, name)
        padded = state.constants[f"{name}:padded"]
        rows, reach = len(band), _TILE + band.shape[1] - 1
        tiles = -(-rows // _TILE)
        # Rows one longer than the tile is wide, read on at the tile's width: each row lies one further to the right.
        skewed = torch.nn.functional.pad(band, (0, _TILE, 0, tiles * _TILE - rows)).view(tiles, -1)
        core = skewed[:, : _TILE * reach].unflatten(1, (_TILE, reach))
        windows = padded.unfold(0, reach, _TILE).transpose(1, 2)  # (tiles, reach, in), overlapping views
        if dtype.itemsize > 2:
            return (core @ windows).flatten(0, 1)[:rows]
        return ((core * HALF_SCALE).to(dtype) @ windows.to(dtype)).flatten(0, 1)[:rows].float() / HALF_SCALE

    def _core_times(self, state: PartState, name: str, directions: Tensor) -> Tensor:
        import torch

        if not self.width:
            return super()._core_times(state, name, directions)
        band = self._band(state, name)
        rows = len(band)
        around = torch.nn.functional.pad(directions[:rows], self._reach)
        return (band * around.unfold(0, band.shape[1], 1)[:rows]).sum(1)

    def _band(self, state: PartState, name: str) -> Tensor:
        """Return the diagonals `(trained directions, 1 to 2 width + 1)`; column by column from the lowest up."""
        import torch

        sides = [state.parameters.get(f"{name}:{side}") for side in ("lower", "upper")]
        middle = state.parameters[f"{name}:increment"][:, None]
        return torch.cat([part for part in (sides[0], middle, sides[1]) if part is not None], 1)

    def core_square(self, parameters: Mapping[str, Tensor], name: str) -> Tensor:
        """The core's sum of squares; entries of the band that lie outside the core stay 0 and do not count."""
        square = super().core_square(parameters, name)
        corner = parameters.get(f"{name}:corner")
        for side, sign in (("lower", -1), ("upper", 1)):
            if (band := parameters.get(f"{name}:{side}")) is None:
                continue
            square = square + band.square().sum()
            for distance in range(1, band.shape[1] + 1 if corner is not None else 0):
                assert corner is not None
                along = corner.diagonal(sign * distance)
                column = band[:, distance - 1] if sign > 0 else band[distance:, -distance]
                count = min(len(along), len(column))
                square = square + 2 * (along[:count] * column[:count]).sum()
        return square
