"""The scales of an FP8 cache, found on calibration tokens: one for a block's keys and one for its values.

Under a scale the largest key, or value, of all tokens and heads is the largest number of the format, 448 for e4m3. Keys
are those that are appended to the cache, after the rotary embedding.

Source: LLM Compressor's calibration of `kv_cache_scheme` (one scale for a tensor, from the extremes), which vLLM reads.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lsiq.errors import NumericalError
from lsiq.formats.base import ActivationFormat
from lsiq.formats.cache_scales import CacheScales
from lsiq.formats.key_value import FLOAT, KeyValue, Running
from lsiq.models.block import Block, run_stream
from lsiq.models.loading import Model
from lsiq.models.result import BlockResult
from lsiq.runtime import processes, streams
from lsiq.runtime.micro_batch import MicroBatch, in_parts


class _Seen(Exception):  # noqa: N818 (not an error: it ends a forward pass early)
    pass


@dataclass(frozen=True)
class _Watching(Running):
    """What runs until keys and values are there, which stay in float; the largest of each are kept in `largest`."""

    largest: dict[str, Tensor] = field(default_factory=dict)

    def fake_keys(self, x: Tensor) -> Tensor:
        self._see("key", x)
        return x

    def fake_values(self, x: Tensor) -> Tensor:
        self._see("value", x)
        raise _Seen

    def _see(self, name: str, x: Tensor) -> None:
        largest = x.detach().abs().amax().float()
        self.largest[name] = largest.maximum(self.largest.get(name, largest))


@torch.no_grad()
def measure_scales(
    block: Block,
    result: BlockResult,
    inputs: Tensor,
    batch: int,
    activation: ActivationFormat,
    cache: KeyValue,
) -> CacheScales:
    """Return the scales for the block with what a method made of it, fed the stream `inputs (N, T, d)`.

    Of several processes each runs its share, and all get the same. Tokens of a prefix do not count: they stay in float.

    Args:
        result: may be empty, for the block as it is.
        activation: the format of the linears' inputs.

    Raises:
        NumericalError: a key or value is not finite.
    """
    device = block.device
    watching = _Watching(activation, cache)
    function = block.with_result(result, watching)
    micro = MicroBatch(batch, f"measuring keys and values of block {block.index}")

    def watch(part: Tensor) -> Tensor:
        with contextlib.suppress(_Seen):
            function(part)
        return part[:, :0]

    for whole in inputs.split(batch):
        in_parts(watch, whole.to(device, non_blocking=True), micro)
        streams.release(inputs)
    largest = processes.largest(torch.stack([watching.largest["key"], watching.largest["value"]]))
    if not largest.isfinite().all():
        raise NumericalError(
            f"block {block.index}: its keys or values are not finite; try model.dtype=float32 or model.dtype=bfloat16"
        )
    return cache.scales_for(largest)


@torch.no_grad()
def with_float_scales(model: Model, cache: KeyValue, tokens: Tensor | None, batch: int) -> Model:
    """Return the model with the scales of its own keys and values, in float; as it is where none are calibrated.

    Blocks have them while their method works, and round-to-nearest beside it has them. What a method made of a block is
    measured again: quantised weights, folded scales and rotations make other keys.

    Args:
        tokens: `(N, T)` calibration tokens.
        batch: sequences that pass through a block at once.
    """
    if not cache.calibrated:
        return model
    assert tokens is not None, "calibrated scales need calibration tokens"
    hidden, kwargs = model.embed(tokens[processes.share(len(tokens))], batch)
    found = []
    for index in range(model.depth):
        block = model.block(index, kwargs)
        found.append(measure_scales(block, BlockResult({}), hidden, batch, FLOAT, cache))
        if index + 1 < model.depth:
            hidden = run_stream(block.with_weights({}), hidden, batch, model.device)
    return replace(model, cache_scales=tuple(found))
