"""The block loop: the one place where a model's weights are replaced."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from lsiq.store import BlockStore

if TYPE_CHECKING:
    from lsiq.config import QuantSettings

# What is kept at once of the calibration tokens: what enters and leaves a block in either model.
STREAMS = 4


@dataclass(frozen=True)
class BlockReport:
    """One finished block.

    Attributes:
        index: its place, from 0.
        seconds: wall time of the method on it, streams included.
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
    already quantised blocks feed it. Of several processes each runs its share of the sequences.

    Args:
        tokens: `(N, T)` calibration tokens, or None for a method that needs none.
        batch: sequences that pass through a block at once.
        cache: the folder of what methods may keep from run to run.
    """
    own = torch.zeros(1, 1, dtype=torch.long) if tokens is None else tokens[distributed.share(len(tokens))]
    hidden, kwargs = model.embed(own, batch)
    if fits(STREAMS * hidden.nbytes, model.device):
        hidden = hidden.to(model.device)
    quantised = hidden if tokens is not None else None
    block: Block | None = None

    def read(later: int) -> Block:
        return block if block is not None and block.index == later else model.block(later, kwargs)

    floats = FloatStream(read, hidden, batch)
    ahead = Ahead(model.depth, read, model.logits, floats.after)

    def context_of(index: int, targets: Tensor | None) -> Context:
        return Context(
            inputs=quantised if "inputs" in method.needs else None,
            targets=targets if "targets" in method.needs else None,
            generator=torch.Generator().manual_seed(seed * 100_003 + index),
            batch=batch,
            log=log,
            tokens=tokens,
            ahead=ahead,
            cache=cache,
        )

    start = time.perf_counter()
    by_block = method.begin(quant, context_of(0, None)) if isinstance(method, WholeMethod) else method
    for index in range(model.depth):
        block = model.block(index, kwargs)
        targets = None if quantised is None else floats.after(index)
        context = context_of(index, targets)
        result = by_block.quantize_block(block, quant, context)
        _check(result, block)
        result = _store(store, index, result)
        error, fed = None, None if quantised is None else quantised[: max(1, TOKENS // quantised.shape[1])].clone()
        if quantised is not None and targets is not None:
            quantised = run_stream(block.with_result(result, quant.activation), quantised, batch, model.device)
            error = _relative_error(quantised, targets, index)
            floats.forget_before(index)
        seconds = time.perf_counter() - start
        yield BlockReport(
            index,
            seconds,
            error,
            block_cost(result, quant, online_multiplications(block, result.rotations)),
            dict(result.metrics),
            [*result.trace, *layer_rows(block, result, quant, fed)],
            result.kernels,
        )
        start = time.perf_counter()


def _check(result: BlockResult, block: Block) -> None:
    """A result must cover every linear of the block and nothing else, in the right shapes."""
    if set(result.weights) != set(block.linears):
        raise AssertionError(f"block {block.index}: the method returned {sorted(result.weights)}, not {block.linears}")
    for name, weight in result.weights.items():
        if weight.codes.shape != block.weights[name].shape:
            raise AssertionError(f"block {block.index}: {name} came back as {tuple(weight.codes.shape)}")
    for name, branch in result.branches.items():
        if branch.shape != block.weights[name].shape:
            raise AssertionError(f"block {block.index}: the side branch of {name} is {branch.shape}")


def _store(store: BlockStore, index: int, result: BlockResult) -> BlockResult:
    """Write a block; the other processes go on with what the first wrote, so that all have the same."""
    if distributed.first():
        store.write(index, result)
    distributed.wait()
    return result if distributed.first() else replace(store.read(index), trace=result.trace)


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
