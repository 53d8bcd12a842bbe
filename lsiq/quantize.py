"""The block loop: the one place where a model's weights are replaced."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsiq.cost import BlockCost, block_cost
from lsiq.errors import NumericalError
from lsiq.layers import TOKENS, layer_rows
from lsiq.methods.base import Ahead, BlockResult, Context, Method, WholeMethod
from lsiq.models.block import Block, run_stream
from lsiq.models.loading import Model
from lsiq.rotation import online_multiplications
from lsiq.store import BlockStore, Kept, Streams

if TYPE_CHECKING:
    from lsiq.config import QuantSettings


@dataclass(frozen=True)
class BlockReport:
    """One finished block.

    Attributes:
        index: its place, from 0.
        seconds: wall time of the method on it, the float stream included.
        error: mean squared difference of the two streams after the block over the float stream's mean square; None
            without calibration data.
        cost: bits and multiply-accumulates of its linears and what runs beside them.
        metrics: what the method reported.
        trace: the rows of its trajectory: how each linear was learned, and what became of it.
    """

    index: int
    seconds: float
    error: float | None
    cost: BlockCost
    metrics: Mapping[str, float]
    trace: Sequence[Mapping[str, Any]]

    @classmethod
    def restored(cls, kept: Kept, error: float | None) -> BlockReport:
        """Return the report of a block that was finished earlier."""
        values = dict(kept.report)
        return cls(**{**values, "error": error, "cost": BlockCost(**values["cost"])})


def check_formats(model: Model, quant: QuantSettings) -> None:
    """Raise ConfigError before anything long starts if a format does not fit the shape of a linear."""
    block = model.skeleton.get_submodule(f"{model.spec.blocks}.0")
    for name in model.spec.linears:
        quant.weight.check(block.get_submodule(name).in_features, name)  # type: ignore[arg-type]


def quantize(
    model: Model,
    method: Method | WholeMethod,
    quant: QuantSettings,
    tokens: Tensor | None,
    batch: int,
    seed: int,
    store: BlockStore,
    log: Callable[[Mapping[str, float]], None],
) -> Iterator[BlockReport]:
    """Quantise the model block by block into `store`, yielding a report after each.

    Two streams run along: the float stream is what the float model feeds each block, the quantised stream what the
    already quantised blocks feed it. After each block it and both streams are on the disk, and what `store` holds of
    this run is not made again: the results are those of a run that was never stopped, bit for bit.

    Args:
        tokens: `(N, T)` calibration tokens, or None for a method that needs none.
        batch: sequences that pass through a block at once.
    """
    hidden, kwargs = model.embed(torch.zeros(1, 1, dtype=torch.long) if tokens is None else tokens, batch)
    ahead = Ahead(model.depth, lambda later: model.block(later, kwargs), model.logits)

    def context_of(index: int, inputs: Tensor | None, targets: Tensor | None) -> Context:
        return Context(
            inputs=inputs if "inputs" in method.needs else None,
            targets=targets if "targets" in method.needs else None,
            generator=torch.Generator().manual_seed(seed * 100_003 + index),
            batch=batch,
            log=log,
            tokens=tokens,
            ahead=ahead,
        )

    entered = None if tokens is None else hidden
    kept = store.kept(model.depth)
    if isinstance(method, WholeMethod):
        if len(kept) < model.depth:
            kept = _store_whole(model, method, quant, kwargs, context_of(0, entered, None), store)
        by_block: Method | None = None
    else:
        by_block = method
    streams = store.read_streams(kept) or Streams(0, [], entered, entered)
    if tokens is None:  # nothing has to be brought to where the blocks end
        streams = Streams(len(kept), [None] * len(kept))
    for one, error in zip(kept, streams.errors, strict=False):
        yield BlockReport.restored(one, error)

    before = kept[streams.done - 1].digest if streams.done else store.model_digest()
    for index in range(streams.done, model.depth):
        start = time.perf_counter()
        block = model.block(index, kwargs)
        floats, quantised = streams.floats, streams.quantised
        targets = None if floats is None else run_stream(block.with_weights({}), floats, batch, model.device)
        fed = None if quantised is None else quantised[: max(1, TOKENS // quantised.shape[1])].clone()
        one = store.restore(index, before)
        if one is None:
            assert by_block is not None  # a whole method's blocks were all stored just now
            result = by_block.quantize_block(block, quant, context_of(index, quantised, targets))
            report = _report(block, result, quant, time.perf_counter() - start)
            report = replace(report, trace=[*report.trace, *layer_rows(block, result, quant, fed)])
            model.checkpoint.check_unchanged()
            before = store.write(index, result, before, asdict(report))
        else:
            result, report, before = one.result, BlockReport.restored(one, None), one.digest
            if by_block is None:  # stored before its inputs were known
                report = replace(report, trace=[*report.trace, *layer_rows(block, result, quant, fed)])
        error = None
        if quantised is not None and targets is not None:
            quantised = run_stream(block.with_result(result, quant.activation), quantised, batch, model.device)
            error = _relative_error(quantised, targets, index)
            last = index == model.depth - 1
            streams = Streams(index + 1, [*streams.errors, error], *((None, None) if last else (targets, quantised)))
            store.write_streams(streams, before)
        yield replace(report, error=error)


def _store_whole(
    model: Model,
    method: WholeMethod,
    quant: QuantSettings,
    kwargs: Mapping[str, Any],
    context: Context,
    store: BlockStore,
) -> list[Kept]:
    """Store all blocks of a method that makes them together, so that none of that work is done twice."""
    start = time.perf_counter()
    by_block = method.begin(quant, context)
    before = store.model_digest()
    for index in range(model.depth):
        block = model.block(index, kwargs)
        result = by_block.quantize_block(block, quant, context)
        report = _report(block, result, quant, time.perf_counter() - start)
        model.checkpoint.check_unchanged()
        before = store.write(index, result, before, asdict(report))
        start = time.perf_counter()
    return store.kept(model.depth)


def _report(block: Block, result: BlockResult, quant: QuantSettings, seconds: float) -> BlockReport:
    """Check what a method made of a block, and return the report on it, the error still open."""
    _check(result, block)
    cost = block_cost(result, quant, online_multiplications(block, result.rotations))
    return BlockReport(block.index, seconds, None, cost, dict(result.metrics), result.trace)


def _check(result: BlockResult, block: Block) -> None:
    """A result must cover every linear of the block and nothing else, in the right shapes."""
    if set(result.weights) != set(block.linears):
        raise AssertionError(f"block {block.index}: the method returned {sorted(result.weights)}, not {block.linears}")
    for name, weight in result.weights.items():
        if weight.codes.shape != block.weights[name].shape:
            raise AssertionError(f"block {block.index}: {name} came back as {tuple(weight.codes.shape)}")
        if not all(part.isfinite().all() for part in (weight.scale, weight.zero)):
            raise NumericalError(
                f"block {block.index}: the grid of {name} is not finite; try model.dtype=float32 or another seed"
            )
    for name, branch in result.branches.items():
        if branch.shape != block.weights[name].shape:
            raise AssertionError(f"block {block.index}: the side branch of {name} is {branch.shape}")


def _relative_error(quantised: Tensor, targets: Tensor, index: int) -> float:
    # Sequence by sequence: streams of large models are tens of gigabytes.
    difference = power = 0.0
    for q, t in zip(quantised, targets, strict=True):
        t = t.float()
        difference += (q.float() - t).square().mean().item()
        power += t.square().mean().item()
    error = difference / max(power, 1e-30)
    if not error < float("inf"):  # NaN included
        raise NumericalError(
            f"block {index}: its outputs are not finite; try model.dtype=float32 or model.dtype=bfloat16"
        )
    return error
