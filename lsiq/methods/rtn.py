"""RTN: round each weight to the nearest point of its group's grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lsiq.methods.base import BlockResult, Context, Need, Traits
from lsiq.settings import settings

if TYPE_CHECKING:
    from lsiq.config import QuantSettings
    from lsiq.models.block import Block


@settings
class RTN(Traits):
    """Round to nearest on min-max grids, without clipping and without data.

    It is the floor that every other method is measured against. An untrained learned clipping is something else: at
    its usual start it clips the range by 1.8 %.
    """

    rounds_only = True

    @property
    def name(self) -> str:
        return "rtn"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def quantize_block(self, block: Block, quant: QuantSettings, context: Context) -> BlockResult:
        del context  # needs no data
        return round_to_nearest(block, quant)


def round_to_nearest(block: Block, quant: QuantSettings) -> BlockResult:
    """Return the codes of every linear of the block, rounded to nearest."""
    from lsiq.formats.tensor import quantize  # torch is not wanted before the settings are known to be right

    return BlockResult({name: quantize(block.weights[name], quant.weight, name) for name in block.linears})
