"""A part of learned methods: one factor per output channel."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from lsiq.parts.base import Draft, PartState, PartTraits
from lsiq.settings import settings

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings
    from lsiq.models.block import Block
    from lsiq.models.context import Context


@settings
class RowScale(PartTraits):
    """Multiply each row of a linear by `exp(s)`, with `s (out, 1)` trained from 0."""

    lr: float = Field(gt=0, description="learning rate of s, above 0")

    name = "row_scale"

    def start(self, block: Block, quant: QuantSettings, context: Context) -> PartState:
        return PartState({name: block.weights[name].new_zeros(len(block.weights[name]), 1) for name in block.linears})

    def apply(self, draft: Draft, state: PartState, block: Block) -> Draft:
        scaled = {name: draft.weights[name] * s.exp() for name, s in state.parameters.items()}
        return replace(draft, weights={**draft.weights, **scaled})
