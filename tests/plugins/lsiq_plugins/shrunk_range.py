"""A method: rounding to nearest on ranges that are a little smaller than the weights'."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from lsiq.methods.base import Traits
from lsiq.models.context import Context, Need
from lsiq.models.result import BlockResult
from lsiq.models.rounding import round_to_nearest
from lsiq.settings import settings

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings
    from lsiq.models.block import Block


@settings
class ShrunkRange(Traits):
    """Clamp every weight to a share of the largest of its linear, then round to nearest."""

    share: float = Field(gt=0, le=1, description="of the largest weight, above 0 to 1")

    rounds_only = True
    name = "shrunk-range"
    needs: frozenset[Need] = frozenset()

    def quantize_block(self, block: Block, quant: QuantSettings, context: Context) -> BlockResult:
        clamped = dict(block.weights)
        for linear in block.linears:
            most = block.weights[linear].abs().max() * self.share
            clamped[linear] = block.weights[linear].clamp(-most, most)
        return round_to_nearest(replace(block, weights=clamped), quant)
