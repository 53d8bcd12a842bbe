"""The block loop: the one place where a model's weights are replaced."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsiq import distributed, streams
from lsiq.cost import BlockCost, block_cost
from lsiq.errors import NumericalError
from lsiq.feed import fits
from lsiq.layers import TOKENS, layer_rows
from lsiq.methods.base import Ahead, BlockResult, Context, Method, WholeMethod
from lsiq.models.block import Block, FloatStream, run_stream
from lsiq.models.loading import Model
from lsiq.rotation import online_multiplications
from lsiq.store import BlockStore, Kept, Streams

if TYPE_CHECKING:
    from lsiq.config import QuantSettings

# What is kept at once of the calibration tokens: what enters and leaves a block in either model.
STREAMS = 4


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
        kernels: how its weights were made while it was learned; empty where nothing was.
    """

    index: int
    seconds: float
    error: float | None
    cost: BlockCost
    metrics: Mapping[str, float]
    trace: Sequence[Mapping[str, Any]]
    kernels: str = ""

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
    cache: Path | None = None,
) -> Iterator[BlockReport]:
    """Quantise the model block by block into `store`, yielding a report after each.

    Two streams run along: the float stream is what the float model feeds each block, the quantised stream what the
    already quantised blocks feed it. Of several processes each runs its share of the sequences. After each block it and
    both streams are on the disk, and what `store` holds of this run is not made again: the results are those of a run
    that was never stopped, bit for bit. Several processes keep the blocks alone, and run their shares through them.

    Args:
        tokens: `(N, T)` calibration tokens, or None for a method that needs none.
        batch: sequences that pass through a block at once.
        cache: the folder of what methods may keep from run to run.
    """
    own = torch.zeros(1, 1, dtype=torch.long) if tokens is None else tokens[distributed.share(len(tokens))]
    hidden, kwargs = model.embed(own, batch)
    resident = fits(STREAMS * hidden.nbytes, model.device)
    if resident:
        hidden = hidden.to(model.device)
    block: Block | None = None

    def read(later: int) -> Block:
        return block if block is not None and block.index == later else model.block(later, kwargs)

    floats = FloatStream(read, hidden, batch)

    def context_of(index: int, inputs: Tensor | None, targets: Tensor | None) -> Context:
        return Context(
            inputs=inputs if "inputs" in method.needs else None,
            targets=targets if "targets" in method.needs else None,
            generator=torch.Generator().manual_seed(seed * 100_003 + index),
            batch=batch,
            log=log,
            tokens=tokens,
            ahead=Ahead(model.depth, read, model.logits, floats.after),
            cache=cache,
        )

    entered = None if tokens is None else hidden
    kept = distributed.from_first(store.kept(model.depth) if distributed.first() else [])
    by_block = None if isinstance(method, WholeMethod) else method
    if isinstance(method, WholeMethod) and len(kept) < model.depth:
        kept = _store_whole(model, method, quant, kwargs, context_of(0, entered, None), store)
    reached = _reached(store, kept, entered)
    for one, error in zip(kept, reached.errors, strict=False):
        yield BlockReport.restored(one, error)
    if resident:
        reached = reached.on(model.device)
    if reached.floats is not None:
        floats = FloatStream(read, reached.floats, batch, reached.done)

    quantised, errors = reached.quantised, [*reached.errors]
    before = kept[reached.done - 1].digest if reached.done else store.model_digest()
    for index in range(reached.done, model.depth):
        start = time.perf_counter()
        block = model.block(index, kwargs)
        targets = None if quantised is None else floats.after(index)
        fed = None if quantised is None else quantised[: max(1, TOKENS // quantised.shape[1])].clone()
        one = _restored(store, index, before)
        if one is not None:
            result, report, before = one.result, BlockReport.restored(one, None), one.digest
        else:
            assert by_block is not None  # a whole method's blocks were all stored just now
            result = by_block.quantize_block(block, quant, context_of(index, quantised, targets))
            report = _report(block, result, quant, time.perf_counter() - start)
        if one is None or by_block is None:  # blocks of a whole method are stored before their inputs are known
            report = replace(report, trace=[*report.trace, *layer_rows(block, result, quant, fed)])
        if one is None:
            model.checkpoint.check_unchanged()
            result, before = _store(store, index, result, before, report)
        error = None
        if quantised is not None and targets is not None:
            quantised = run_stream(block.with_result(result, quant.activation), quantised, batch, model.device)
            error = _relative_error(quantised, targets, index)
            floats.forget_before(index)
            errors.append(error)
            _store_streams(store, Streams(index + 1, errors, targets, quantised), before, model.depth)
        yield replace(report, error=error)


def _reached(store: BlockStore, kept: Sequence[Kept], entered: Tensor | None) -> Streams:
    """Return how far an earlier try came: the streams behind its last block, or those that enter the first one."""
    if entered is None:  # nothing has to be brought to where the blocks end
        return Streams(len(kept), [None] * len(kept))
    found = store.read_streams(kept) if distributed.size() == 1 else None
    return found or Streams(0, [], entered, entered)


def _restored(store: BlockStore, index: int, before: str) -> Kept | None:
    """Return a block that is stored already; of several processes all find it or none."""
    one = store.restore(index, before) if distributed.first() else None
    there = distributed.from_first(one is not None)
    return store.restore(index, before) if there and one is None else one


def _store(
    store: BlockStore, index: int, result: BlockResult, before: str, report: BlockReport
) -> tuple[BlockResult, str]:
    """Write a block and return it with its digest; the other processes go on with what the first wrote."""
    first = distributed.first()
    digest = distributed.from_first(store.write(index, result, before, asdict(report)) if first else "")
    return result if first else replace(store.read(index), trace=result.trace), digest


def _store_streams(store: BlockStore, streams: Streams, before: str, depth: int) -> None:
    if distributed.size() == 1:
        last = streams.done == depth
        store.write_streams(replace(streams, floats=None, quantised=None) if last else streams, before)


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
        _, before = _store(store, index, result, before, report)
        start = time.perf_counter()
    return store.kept(model.depth)


def _report(block: Block, result: BlockResult, quant: QuantSettings, seconds: float) -> BlockReport:
    """Check what a method made of a block, and return the report on it, the error still open."""
    _check(result, block)
    cost = block_cost(result, quant, online_multiplications(block, result.rotations))
    return BlockReport(block.index, seconds, None, cost, dict(result.metrics), result.trace, result.kernels)


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
        streams.release(quantised, targets)
    error = distributed.add_number(difference) / max(distributed.add_number(power), 1e-30)
    if not error < float("inf"):  # NaN included
        raise NumericalError(
            f"block {index}: its outputs are not finite; try model.dtype=float32 or model.dtype=bfloat16"
        )
    return error
