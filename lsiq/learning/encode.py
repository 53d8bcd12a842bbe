"""From a finished draft to codes: the stored result of a learned method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lsiq.formats.tensor import QuantizedTensor
from lsiq.models.block import Block
from lsiq.models.result import BlockResult
from lsiq.parts.base import Draft, clipped_range, rounded_target

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings


# How far a latent weight may stand from its cell's centre, in steps: in float16 still short of the next cell.
EDGE = 0.499


def merge(draft: Draft, block: Block, quant: QuantSettings) -> BlockResult:
    """Encode the draft's linears; what else it changed (norms, biases) is stored as it is.

    Decoding gives what `rounded` gave while learning, bit for bit.
    """
    weights: dict[str, QuantizedTensor] = {}
    for name in block.linears:
        weight, scale, zero = rounded_target(draft, name, quant)
        fmt = quant.of(name)
        weights[name] = QuantizedTensor(fmt.encode(weight, scale, zero), scale, zero, fmt)
    return BlockResult(weights, _floats(draft, block))


def latents_of(draft: Draft, result: BlockResult, quant: QuantSettings) -> dict[str, Tensor]:
    """Return where in its cell of the grid each weight stands before it is rounded, in steps from the cell's centre.

    Where steps differ from cell to cell, a step is the distance to the neighbour on the weight's side.

    By name of a linear's weight, `(out, in)`, float16, within EDGE of the centre: a weight beyond the grid's end stands
    at the outer edge of its last cell. Codes and latents together round to the codes.
    """
    latents = {}
    for name, stored in result.weights.items():
        weight, scale, zero = rounded_target(draft, name, quant)
        fmt = stored.format
        codes = fmt.grouped(stored.codes).to(scale.dtype)
        place = fmt.place(fmt.grouped(weight), codes, scale, zero).clamp(-EDGE, EDGE)
        latents[name] = place.reshape(weight.shape).half()
    return latents


def prepared(draft: Draft, block: Block, quant: QuantSettings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what else the draft changed, and its linears clamped to their ranges, for another method to round.

    Rounding them to nearest gives what `merge` gives, for a draft without offsets, but for the one code that a
    symmetric integer grid has below its range.
    """
    linears = {}
    for name in block.linears:
        fmt = quant.of(name)
        lo, hi = fmt.limits(*clipped_range(draft, name, quant))
        weight = draft.weights[name]
        linears[name] = fmt.grouped(weight).clamp(lo, hi).reshape(weight.shape)
    return _floats(draft, block), linears


def _floats(draft: Draft, block: Block) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in draft.weights.items()
        if name not in block.linears and tensor is not block.weights.get(name)
    }
