"""RTN: round each weight to the nearest point of its group's grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lsiq.methods.base import Traits
from lsiq.models.context import Context, Need
from lsiq.models.result import BlockResult
from lsiq.models.rounding import round_to_nearest
from lsiq.settings import settings

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings
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
