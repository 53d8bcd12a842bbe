"""What a method makes of a block, and the weights that it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from lsiq.formats.cache_scales import CacheScales
    from lsiq.formats.low_rank import SideBranch
    from lsiq.formats.tensor import QuantizedTensor
    from lsiq.linalg.rotation import Rotation


@dataclass(frozen=True)
class BlockResult:
    """What a method made of a block.

    Attributes:
        weights: by dotted name of the linear's weight, its codes; linears that are not named stay in float.
        floats: by dotted name, norms, biases and float linears that were folded into; replaces the block's own.
        metrics: numbers worth a row in the record.
        state: learned parameters worth keeping, by part and name.
        trace: rows of what happened while learning, for the run's trajectory table.
        branches: by dotted name of the linear's weight, the low-rank product that runs beside its codes.
        reference: by dotted name of the linear's weight, the float weight that its codes stand for, where that is not
            the block's own: folded scales belong to it, clipping and learned increments do not. With `floats` it
            makes the same float function as the block. Not stored.
        rotations: what rotates the linears' inputs, or queries and keys, while the block runs; named as in `Block`.
        latents: by dotted name of the linear's weight, where in its cell each weight stood before it was rounded,
            `(out, in)`, in steps from the centre, within one half; empty where a method does not keep them.
        kernels: which of equal ways made the weights, while they were learned or their columns rounded: triton,
            compile or plain; empty where there is one way only.
        cache_scales: under which keys and values are rounded once the block is done, where scales are calibrated; the
            block loop measures them, no method.
    """

    weights: Mapping[str, QuantizedTensor]
    floats: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    trace: Sequence[Mapping[str, Any]] = ()
    branches: Mapping[str, SideBranch] = field(default_factory=dict)
    reference: Mapping[str, Tensor] = field(default_factory=dict)
    rotations: Mapping[str, Rotation] = field(default_factory=dict)
    latents: Mapping[str, Tensor] = field(default_factory=dict)
    kernels: str = ""
    cache_scales: CacheScales | None = None


def result_weights(result: BlockResult, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Decode a result to the weights it stands for, on the device of `like`."""
    device = next(iter(like.values())).device
    decoded = {name: tensor.to(device).decode() for name, tensor in result.weights.items()}  # a byte a weight travels
    return decoded | {name: tensor.to(device) for name, tensor in result.floats.items()}
