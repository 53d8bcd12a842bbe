"""From a finished draft to codes: the stored result of a learned method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lsiq.formats.tensor import QuantizedTensor
from lsiq.methods.base import BlockResult
from lsiq.models.block import Block
from lsiq.parts.base import Draft, placed

if TYPE_CHECKING:
    from lsiq.config import QuantSettings


def merge(draft: Draft, block: Block, quant: QuantSettings) -> BlockResult:
    """Encode the draft's linears; what else it changed (norms, biases) is stored as it is.

    Decoding gives what `rounded` gave while learning, bit for bit.
    """
    weights: dict[str, QuantizedTensor] = {}
    for name in block.linears:
        weight, scale, zero = placed(draft, name, quant)
        weights[name] = QuantizedTensor(quant.weight.encode(weight, scale, zero), scale, zero, quant.weight)
    floats = {
        name: tensor
        for name, tensor in draft.weights.items()
        if name not in weights and tensor is not block.weights.get(name)
    }
    return BlockResult(weights, floats)
