"""Rounding: each weight learns whether it is rounded up or down."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from lsiq.parts.base import Draft, Hardening, PartState, PartTraits, left_out
from lsiq.settings import settings

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings
    from lsiq.models.block import Block
    from lsiq.models.context import Context


@settings
class Rounding(PartTraits):
    """Learned rounding: an offset `v` per weight, `|v| ≤ bound`, added before rounding: `round(w / h + v)`.

    The offset starts at 0, that is, at rounding to nearest; with a bound of one half it chooses between the two
    neighbours on the grid. The result is ordinary codes.

    With `hardening` the rounding sets in slowly: over that share of the steps a weight goes linearly from the unrounded
    to the rounded one, so that the offsets first follow a smooth loss.

    Source: SignRound, in AutoRound (arXiv 2309.05516, equations 3 to 5): half a step, signed-gradient steps of
    one over their number with linear decay.

    Deviation: fewer than 16 steps are no larger than a sixteenth; AutoRound takes 200 and more.
    """

    chooses_codes = True

    lr: float | None = Field(
        None, gt=0, description="learning rate of the offsets, above 0; null: 1 / steps, of 16 at least"
    )
    bound: float = Field(0.5, gt=0, le=8, description="how far an offset may go, in steps of the grid, above 0 to 8")
    hardening: Hardening = 0.0

    @property
    def name(self) -> str:
        return "rounding"

    def start(self, block: Block, quant: QuantSettings, context: Context) -> PartState:
        del context
        names = [name for name in block.linears if quant.of(name).bits < 16]
        if not names:
            return PartState({})
        parameters = {name: block.weights[name].new_zeros(block.weights[name].shape) for name in names}
        bounds = dict.fromkeys(parameters, (-self.bound, self.bound))
        weight = block.weights[names[0]]
        constants = {"done": weight.new_ones(())} if self.hardening else {}
        return PartState(parameters, constants, bounds, frozenset(parameters))

    def apply(self, draft: Draft, state: PartState, block: Block) -> Draft:
        draft = replace(draft, offsets=state.parameters)
        if not self.hardening:
            return draft
        return replace(draft, softness=left_out(state, self.hardening))
