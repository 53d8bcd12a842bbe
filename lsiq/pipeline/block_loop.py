"""The block loop: the one place where a model's weights are replaced."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsiq.calib.cache_range import measure_scales
from lsiq.errors import NumericalError
from lsiq.methods.base import Method, WholeMethod
from lsiq.models.block import Block, FloatStream, run_stream
from lsiq.models.context import Ahead, Context
from lsiq.models.loading import Model
from lsiq.models.online import online_multiplications
from lsiq.models.result import BlockResult
from lsiq.pipeline.cost import BlockCost, block_cost
from lsiq.pipeline.layer_report import first_tokens, layer_rows
from lsiq.results.memory_store import MemoryStore
from lsiq.results.store import BlockStore, Digest, StoredBlock, Streams
from lsiq.runtime import processes, streams
from lsiq.runtime.device import fits
from lsiq.runtime.terminal import warn

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings


# What is kept at once of the calibration tokens: what enters and leaves a block in either model.
STREAMS = 4

# Of a GPU's free memory, what the float weights of a model may take that stay there once they are read: a block is
# asked for several times, by the loss that looks ahead and in both streams, and an end stage asks for all again.
KEPT_SHARE = 1 / 32

# How many times the loss of its first epoch a block's error may be before somebody is warned: training in bfloat16 and
# on a part of the sequences makes the two differ by some per cent; blocks that learn leave 0.1 to 0.9.
HARM = 1.1


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
        kernels: which of equal ways made its weights, as `BlockResult.kernels` has it.
    """

    index: int
    seconds: float
    error: float | None
    cost: BlockCost
    metrics: Mapping[str, float]
    trace: Sequence[Mapping[str, Any]]
    kernels: str = ""

    @classmethod
    def restored(cls, stored: StoredBlock, error: float | None) -> BlockReport:
        """Return the report of a block that was finished earlier."""
        values = dict(stored.report)
        return cls(**{**values, "error": error, "cost": BlockCost(**values["cost"])})


def quantize(
    model: Model,
    method: Method | WholeMethod,
    quant: QuantSettings,
    tokens: Tensor | None,
    batch: int,
    seed: int,
    store: BlockStore | MemoryStore,
    log: Callable[[Mapping[str, float]], None],
    cache: Path | None = None,
) -> Generator[BlockReport]:
    """Quantise the model block by block into `store`, yielding a report after each.

    Two streams run along: the float stream is what the float model feeds each block, the quantised stream what the
    already quantised blocks feed it. Of several processes each runs its share of the sequences. After each block it
    goes to the disk, and so do both streams where that is worth it; all is there when the iteration ends or is closed.
    What `store` holds of this run is not made again: the results are those of a run that was never stopped, bit for
    bit. Several processes keep the blocks alone, and run their shares through them.

    Args:
        tokens: `(N, T)` calibration tokens, or None for a method that needs none.
        batch: sequences that pass through a block at once.
        cache: the folder of what methods may keep from run to run.
    """
    loop = _Loop(model, method, quant, tokens, batch, seed, store, log, cache)
    try:
        yield from loop.take_up()
        while loop.position < model.depth:
            yield loop.next_block()
    finally:
        store.wait()


@dataclass(eq=False)
class _Loop:
    """The loop over the blocks: what it works with, named as in `quantize`, and where it stands.

    Attributes:
        done: how many blocks are behind.
        before: the digest of the last of them.
        errors: of each of them, the relative error of its outputs.
        blocks: those of the float model.
        floats, quantised: both streams; the quantised one is None without calibration data.
    """

    model: Model
    method: Method | WholeMethod
    quant: QuantSettings
    tokens: Tensor | None
    batch: int
    seed: int
    store: BlockStore | MemoryStore
    log: Callable[[Mapping[str, float]], None]
    cache: Path | None

    def __post_init__(self) -> None:
        tokens = torch.zeros(1, 1, dtype=torch.long)
        if self.tokens is not None:
            tokens = self.tokens[processes.share(len(self.tokens))]
        quantised, kwargs = self.model.embed(tokens, self.batch)
        hidden = quantised
        if self.model.float_skeleton is not None:
            hidden, _ = self.model.as_float.embed(tokens, self.batch)
        self.resident = fits(STREAMS * hidden.nbytes, self.model.device)
        if self.resident:
            hidden, quantised = hidden.to(self.model.device), quantised.to(self.model.device)
        self.position = 0
        self.before: Digest = ""
        self.errors: list[float | None] = []
        size = 4 * sum(parameter.numel() for parameter in self.model.blocks.parameters())
        small = self.model.device.type == "cuda" and fits(size, self.model.device, KEPT_SHARE)
        self.blocks = _Blocks(self.model, kwargs, self.quant, {} if small else None)
        self.floats = FloatStream(self.blocks, hidden, self.batch)
        self.quantised = None if self.tokens is None else quantised

    def take_up(self) -> Iterator[BlockReport]:
        """Go to where an earlier try came, and yield the reports of its blocks up to there."""
        stored = processes.from_first(self.store.finished_blocks(self.model.depth) if processes.first() else [])
        if isinstance(self.method, WholeMethod):
            if len(stored) < self.model.depth:
                stored = self._store_whole(self.method)
            if self.store.unfinished is not None:
                self.store.unfinished.clear()
        if self.tokens is None:  # no streams have to be brought to where the blocks end
            self.position = len(stored)
            self.errors += [None] * len(stored)
        elif processes.size() == 1 and (streams := self.store.read_streams(stored)) is not None:
            self._enter(streams)
        self.before = stored[self.position - 1].digest if self.position else self.store.model_digest()
        for block, error in zip(stored, self.errors, strict=False):
            yield BlockReport.restored(block, error)

    def _enter(self, streams: Streams) -> None:
        """Let both streams be what enters the next block; after the last one nothing does."""
        self.position, self.errors = streams.position, [*streams.errors]
        if self.resident:
            streams = streams.on(self.model.device)
        if streams.floats is not None:
            self.floats = FloatStream(self.blocks, streams.floats, self.batch, streams.position)
        self.quantised = streams.quantised

    def next_block(self) -> BlockReport:
        """Quantise the next block, or take it from the store, run both streams through it, and report on it."""
        start, index = time.perf_counter(), self.position
        block = self.blocks.turn_to(index)
        targets = None if self.quantised is None else self.floats.after(index)
        stored = self._restored(index)
        if stored is None:
            result, report = self._make(block, targets, start)
        else:
            result, report, self.before = stored.result, BlockReport.restored(stored, None), stored.digest
            if isinstance(self.method, WholeMethod):  # its blocks were stored before their inputs were known
                report = self._with_rows(report, block, result)
        self.position += 1
        if self.quantised is None or targets is None:
            return report
        function = block.with_result(result, self.quant.running)
        self.quantised = run_stream(function, self.quantised, self.batch, self.model.device)
        self.errors.append(_relative_error(self.quantised, targets, index))
        self.floats.forget_before(index)
        if stored is None or self.position == self.model.depth:  # to run through a stored block takes no training
            self._store_streams(targets)
        report = replace(report, error=self.errors[-1])
        if stored is None:
            _warn_of_harm(report)
        return report

    def _make(self, block: Block, targets: Tensor | None, start: float) -> tuple[BlockResult, BlockReport]:
        """Let the method quantise a block, and store what it made; the clock ran from `start`."""
        assert not isinstance(self.method, WholeMethod)  # all its blocks were stored before the first one is taken up
        block_formats = self.quant.in_block(block.index)
        result = BlockResult({})  # of a block whose linears all stay in float
        if block.linears:
            result = self.method.quantize_block(block, block_formats, self._context(block.index, targets))
        result = self._calibrated(block, result, self.quantised)
        report = _report(block, result, self.quant, time.perf_counter() - start)
        report = self._with_rows(report, block, result)
        return self._store(block, result, report), report

    def _store_whole(self, method: WholeMethod) -> list[StoredBlock]:
        """Store all blocks of a method that makes them together, so that none of that work is done twice."""
        start = time.perf_counter()
        context = self._context(0, None)
        by_block = method.begin(self.quant, context)
        self.before = self.store.model_digest()
        hidden = self.quantised
        for index in range(self.model.depth):
            block = self.blocks(index)
            result = by_block.quantize_block(block, self.quant.in_block(index), context)
            result = self._calibrated(block, result, hidden)
            self._store(block, result, _report(block, result, self.quant, time.perf_counter() - start))
            start = time.perf_counter()
            if self.quant.kv.calibrated and hidden is not None:
                function = block.with_result(result, self.quant.running)
                hidden = run_stream(function, hidden, self.batch, self.model.device)
        return self.store.finished_blocks(self.model.depth)

    def _calibrated(self, block: Block, result: BlockResult, hidden: Tensor | None) -> BlockResult:
        """Return what a method made of a block with the scales of its keys and values, where they are calibrated.

        They are those of the quantised model: it feeds the block `hidden`, and the block is the one that is stored.
        """
        if not self.quant.kv.calibrated:
            return result
        assert hidden is not None  # the settings ask for calibration tokens
        scales = measure_scales(block, result, hidden, self.batch, self.quant.activation, self.quant.kv)
        metrics = {**result.metrics, "key_scale": scales.key, "value_scale": scales.value}
        return replace(result, cache_scales=scales, metrics=metrics)

    def _context(self, index: int, targets: Tensor | None) -> Context:
        needs = self.method.needs
        return Context(
            inputs=self.quantised if "inputs" in needs else None,
            targets=targets if "targets" in needs else None,
            generator=torch.Generator().manual_seed(self.seed * 100_003 + index),
            batch=self.batch,
            log=self.log,
            tokens=self.tokens,
            ahead=Ahead(self.model.depth, self.blocks, self.model.logits, self.floats.after),
            cache=self.cache,
            unfinished=self.store.unfinished,
        )

    def _with_rows(self, report: BlockReport, block: Block, result: BlockResult) -> BlockReport:
        """Return the report with a row for each linear, looked at on the first sequences that enter the block."""
        rows = layer_rows(block, result, self.quant.in_block(block.index), first_tokens(self.quantised))
        return replace(report, trace=[*report.trace, *rows])

    def _restored(self, index: int) -> StoredBlock | None:
        """Return a block that is stored already; of several processes all find it or none."""
        stored = self.store.restore(index, self.before) if processes.first() else None
        exists = processes.from_first(stored is not None)
        return self.store.restore(index, self.before) if exists and stored is None else stored

    def _store(self, block: Block, result: BlockResult, report: BlockReport) -> BlockResult:
        """Write a block and return it; the other processes go on with what the first wrote."""
        self.model.checkpoint.check_unchanged()
        first, index = processes.first(), block.index
        self.before = processes.from_first(
            self.store.write(index, result, self.before, asdict(report)) if first else ""
        )
        return result if first else replace(self.store.read(index), trace=result.trace)

    def _store_streams(self, targets: Tensor) -> None:
        if processes.size() == 1:
            entering = (None, None) if self.position == self.model.depth else (targets, self.quantised)
            self.store.write_streams(Streams(self.position, self.errors, *entering), self.before)


@dataclass(eq=False)
class _Blocks:
    """The blocks of the float model by their index; the one that is worked on need not be read again.

    Attributes:
        kept: those that were read, where they are not read again either; None where they are.
    """

    model: Model
    kwargs: Mapping[str, Any]
    quant: QuantSettings
    kept: dict[int, Block] | None = None
    at_hand: Block | None = None

    def __call__(self, index: int) -> Block:
        block = self.at_hand
        return block if block is not None and block.index == index else self._read(index)

    def turn_to(self, index: int) -> Block:
        """Return the block that is worked on from now on."""
        self.at_hand = self._read(index)
        return self.at_hand

    def _read(self, index: int) -> Block:
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        block = self.model.block(index, self.kwargs).under(self.quant)
        if self.kept is not None:
            self.kept[index] = block
        return block


def _report(block: Block, result: BlockResult, quant: QuantSettings, seconds: float) -> BlockReport:
    """Check what a method made of a block, and return the report on it, the error still open."""
    _check(result, block)
    cost = block_cost(result, quant, online_multiplications(block, result.rotations), _untouched(block))
    return BlockReport(block.index, seconds, None, cost, dict(result.metrics), result.trace, result.kernels)


def _untouched(block: Block) -> int:
    return sum(block.weights[name].numel() for name in block.untouched)


def _check(result: BlockResult, block: Block) -> None:
    """A result must cover every linear of the block that is to be quantised and nothing else, in the right shapes."""
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


def _warn_of_harm(report: BlockReport) -> None:
    """Say so where training left a block with a larger error than it found: too few steps, or too large ones.

    With hardening the first epoch's loss is that of weights of which little is rounded, so it may be less for that.
    """
    first = report.metrics.get("loss_first")
    if first is None or report.error is None or report.error <= HARM * first:
        return
    warn(
        f"block {report.index}: its error is {report.error:.3g} after {report.metrics['steps']:.0f} steps of training, "
        f"above {first:.3g} in the first epoch; take more steps (method.training.epochs, calib.samples) or lower rates"
    )


def _relative_error(quantised: Tensor, targets: Tensor, index: int) -> float:
    # Sequence by sequence: streams of large models are tens of gigabytes.
    difference = power = 0.0
    for q, t in zip(quantised, targets, strict=True):
        t = t.float()
        difference += (q.float() - t).square().mean().item()
        power += t.square().mean().item()
        streams.release(quantised, targets)
    error = processes.add_number(difference) / max(processes.add_number(power), 1e-30)
    if not error < float("inf"):  # NaN included
        raise NumericalError(
            f"block {index}: its outputs are not finite; try model.dtype=float32 or model.dtype=bfloat16"
        )
    return error
