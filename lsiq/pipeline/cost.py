"""What a quantised model costs: bits, bytes and multiply-accumulates, with everything counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from lsiq.models.loading import Model
from lsiq.models.outside import outside_modules
from lsiq.models.result import BlockResult
from lsiq.pipeline.area import relative_area

if TYPE_CHECKING:
    from lsiq.formats.base import WeightFormat
    from lsiq.formats.quant import QuantSettings


@dataclass(frozen=True)
class BlockCost:
    """Of the linears of one block.

    Attributes:
        weights: how many original weights they have.
        stored_bits: of codes, scales, zero points, exponents, side branches and rotations done online.
        macs: multiply-accumulates per token by width, weight times activation, such as `4x8`; of
            floating-point numbers by their type, such as `e2m1xe4m3`.
    """

    weights: int
    stored_bits: int
    macs: Mapping[str, int] = field(default_factory=dict)


def block_cost(result: BlockResult, quant: QuantSettings, online: int = 0, untouched: int = 0) -> BlockCost:
    """Return what a quantised block costs; side branches multiply in the width of their factors, rotations in 16 bits.

    Args:
        online: multiply-accumulates per token of the rotations done online, as plain products of their small matrices.
        untouched: how many weights of its linears stay in 16 bits.
    """
    macs: Counter[str] = Counter()
    bits = weights = 0
    for weight in result.weights.values():
        macs[f"{weight.format.number}x{quant.activation.number}"] += weight.codes.numel()
        weights += weight.codes.numel()
        bits += weight.stored_bits
    for branch in result.branches.values():
        macs[f"{branch.number}x{quant.activation.number}"] += branch.rank * sum(branch.shape)
        bits += branch.stored_bits
    if untouched:
        macs[f"16x{quant.activation.number}"] += untouched
        weights, bits = weights + untouched, bits + 16 * untouched
    bits += sum(rotation.stored_bits for rotation in result.rotations.values())
    if online:
        macs["16x16"] += online
    return BlockCost(weights, bits, dict(macs))


def float_cost(model: Model) -> BlockCost:
    """Return what a block costs whose linears stay in 16 bits."""
    block = model.skeleton.get_submodule(f"{model.spec.blocks}.0")
    weights = sum(block.get_submodule(name).weight.numel() for name in model.spec.linears)  # type: ignore[union-attr]
    return BlockCost(weights, 16 * weights, {"16x16": weights})


def model_cost(
    model: Model, blocks: Iterable[BlockCost], outside: Mapping[str, WeightFormat] | None = None
) -> dict[str, Any]:
    """Return the costs of a model by name, plain data for the record.

    Args:
        outside: the formats of embeddings and head, by name, where they are rounded.

    average_bits: bits per original weight of the linears in the blocks, and of embeddings and head that are rounded.
    checkpoint_bytes: those, and all other tensors (embeddings, norms, biases, head, what rotates the residual stream)
        in 16 bits, tied ones once.
    bytes_per_token: weights read to generate one token of one sequence: all, but of an embedding that is not the head
        as well only a row. The cache of keys and values is left out: it grows with the context.
    macs_per_token: multiply-accumulates by width, weight times activation, the head included in its own. Products of
        queries, keys and values are left out for the same reason.
    relative_area: see `lsiq.pipeline.area`; of the blocks' linears.
    """
    costs = list(blocks)
    weights, bits = sum(block.weights for block in costs), sum(block.stored_bits for block in costs)
    macs: Counter[str] = Counter()
    for block in costs:
        macs.update(block.macs)
    area = relative_area(macs, weights)
    head: Any = model.skeleton.get_output_embeddings()  # type: ignore[operator]
    residual = 0 if model.residual is None else model.residual.numel()
    other_weights = sum(parameter.numel() for parameter in model.skeleton.parameters()) - weights + residual
    unread = 0
    for module in model.skeleton.modules():
        if isinstance(module, nn.Embedding) and module.weight is not head.weight:
            unread += module.weight.numel() - module.embedding_dim
    looked_up, head_bits = 0, 16
    float_head: Any = model.as_float.skeleton.get_output_embeddings()  # type: ignore[operator]
    for module, fmt in outside_modules(model.as_float, outside or {}).values():
        shape = module.weight.shape
        weights, bits = weights + module.weight.numel(), bits + fmt.stored_bits(*shape)
        other_weights -= module.weight.numel()
        if isinstance(module, nn.Embedding) and module.weight is not float_head.weight:
            looked_up = fmt.stored_bits(*shape) - fmt.stored_bits(1, shape[1])
            unread -= module.weight.numel() - module.embedding_dim
        else:
            head_bits = fmt.bits
    macs[f"{head_bits}x16"] += head.weight.numel()
    macs["16x16"] += 2 * residual  # rotated where it enters the blocks and where it leaves them
    return {
        "average_bits": bits / weights,
        "checkpoint_bytes": bits // 8 + 2 * other_weights,
        "bytes_per_token": (bits - looked_up) // 8 + 2 * (other_weights - unread),
        "macs_per_token": dict(macs),
        "relative_area": area,
    }
