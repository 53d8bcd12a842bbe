"""Several models and any number of batches through the blocks, in one pass over the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lsiq.models.block import Block, BlockFunction
from lsiq.models.loading import Model
from lsiq.runtime import streams as disk
from lsiq.runtime.device import fits
from lsiq.runtime.micro_batch import MicroBatch, in_parts

T = TypeVar("T")
FunctionOf = Callable[[Block], BlockFunction]


@torch.no_grad()
def run_blocks(
    model: Model,
    batches: Mapping[str, Sequence[Tensor]],
    functions_of: Mapping[str, FunctionOf],
    advance: Callable[[], None],
) -> dict[str, list[Tensor]]:
    """Return what leaves the last block, by model one `(B, T, d)` for each of its batches `(B, T)` of token ids.

    Every block is read once, for all models and batches; the next one is read and decoded while this one runs, so the
    device holds two blocks of each model. Batches may differ in length; models may have different batches.

    Args:
        functions_of: by model, what turns a float block into the one to run.
        advance: called after each block.
    """
    streams, kwargs = _embed(model, batches)
    keep = _keeper(model, streams)
    micro = MicroBatch(
        max((len(batch) for corpus_batches in batches.values() for batch in corpus_batches), default=1), "evaluating"
    )

    def prepare(index: int) -> dict[str, BlockFunction]:
        block = model.block(index, {})
        return {name: functions_of[name](block) for name in streams}

    for functions in prefetched(prepare, model.depth, model.device):
        for name, stream in streams.items():
            for position, hidden in enumerate(stream):
                inputs = hidden.to(model.device, non_blocking=True)
                stream[position] = keep(in_parts(partial(_run, functions[name], kwargs), inputs, micro))
        advance()
        del functions  # before the next block's are waited for
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return streams


def _run(function: BlockFunction, kwargs: Mapping[int, Mapping[str, Any]], hidden: Tensor) -> Tensor:
    return function(hidden, kwargs[hidden.shape[1]])


def _embed(
    model: Model, batches: Mapping[str, Sequence[Tensor]]
) -> tuple[dict[str, list[Tensor]], dict[int, dict[str, Any]]]:
    """Return what enters the first block, and the blocks' keyword arguments by sequence length."""
    entered: dict[int, Tensor] = {}  # models that read the same batch share its embedding
    kwargs: dict[int, dict[str, Any]] = {}
    for batch in (batch for corpus_batches in batches.values() for batch in corpus_batches):
        if id(batch) not in entered:
            entered[id(batch)], kwargs[batch.shape[1]] = model.embed(batch, len(batch))
    return {name: [entered[id(batch)] for batch in corpus_batches] for name, corpus_batches in batches.items()}, kwargs


def _keeper(model: Model, streams: Mapping[str, Sequence[Tensor]]) -> Callable[[Tensor], Tensor]:
    """Return what puts a block's output where it waits for the next block: on the device while there is room."""
    if disk.on_disk():
        return _to_disk
    if fits(sum(hidden.nbytes for stream in streams.values() for hidden in stream), model.device):
        return lambda hidden: hidden
    # Copies to and from pinned memory keep the order of the GPU's queue, so the host need not wait for them.
    return lambda hidden: torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True).copy_(
        hidden, non_blocking=True
    )


def _to_disk(hidden: Tensor) -> Tensor:
    copy = disk.empty(hidden.shape, hidden.dtype).copy_(hidden)
    disk.release(copy)
    return copy


def prefetched(prepare: Callable[[int], T], count: int, device: torch.device) -> Iterator[T]:
    """Yield `prepare(0) … prepare(count - 1)`, each prepared in another thread while its predecessor is in use.

    On a GPU the preparation has its own queue; its memory is taken back only when what used it is done.
    """
    cuda = device.type == "cuda"
    side = torch.cuda.Stream(device) if cuda else None

    def load(index: int) -> tuple[T, Any]:
        with torch.no_grad(), torch.cuda.stream(side) if cuda else contextlib.nullcontext():
            prepared = prepare(index)
            return prepared, None if side is None else side.record_event()

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        upcoming = pool.submit(load, 0)
        for index in range(count):
            prepared, ready = upcoming.result()
            if index + 1 < count:
                upcoming = pool.submit(load, index + 1)
            if ready is not None:
                torch.cuda.current_stream(device).wait_event(ready)
            yield prepared
            if cuda:
                torch.cuda.current_stream(device).synchronize()
            del prepared
