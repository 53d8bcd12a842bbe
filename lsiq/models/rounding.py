"""A whole block rounded to nearest: what a model is without any method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lsiq.models.result import BlockResult

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings
    from lsiq.models.block import Block


def round_to_nearest(block: Block, quant: QuantSettings) -> BlockResult:
    """Return the codes of every linear of the block, rounded to nearest."""
    from lsiq.formats.tensor import quantize  # torch is not wanted before the settings are known to be right

    block_formats = quant.in_block(block.index)
    formats = {name: block_formats.of(name) for name in block.linears}
    return BlockResult(
        {name: quantize(block.weights[name], fmt, name) for name, fmt in formats.items() if fmt.bits < 16}
    )
