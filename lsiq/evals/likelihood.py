"""How likely continuations are after their contexts, under several models, in one pass over the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsiq.errors import InputError
from lsiq.evals.block_pass import run_blocks
from lsiq.evals.windows import Variant, by_model
from lsiq.models.loading import Model
from lsiq.runtime import processes
from lsiq.runtime.cache import ContentCache

# A context and what follows it, as token ids.
Pair = tuple[Sequence[int], Sequence[int]]
# Host memory for what passes between two blocks; more items than fit are read in several passes.
_STREAM_BYTES = 2**33
# Tokens whose logits are held at once (256 MiB in float32).
_LOGITS = 2**26


@dataclass(frozen=True)
class Likelihoods:
    """Of each pair: the log likelihood `(pairs,)` of the continuation in nats, and whether greedy decoding says it."""

    log_likelihood: Tensor
    greedy: Tensor


@dataclass(frozen=True)
class _Input:
    """Tokens that the model reads, and the pairs that are read off its predictions: index and continuation."""

    tokens: tuple[int, ...]
    pairs: list[tuple[int, Sequence[int]]]


def measure_pairs(
    model: Model,
    pairs: Sequence[Pair],
    variants: Mapping[str, Variant],
    batch_tokens: int,
    cache: ContentCache,
    progress: Callable[[int], Callable[[], None]],
) -> tuple[dict[str, Likelihoods], dict[str, Mapping[str, str]]]:
    """Return the likelihoods of all pairs by model, and for those from the cache where they come from.

    A context that is too long for the model's positions loses its beginning, as in lm-evaluation-harness.

    Args:
        batch_tokens: how many tokens pass through a block at once.
        progress: called with the number of steps before each model's blocks run; returns what to call after each.

    Raises:
        InputError: a continuation is empty or alone longer than the model's positions.
    """
    keys = {p: cache.key(kind="pairs", pairs=hash_pairs(pairs), reference=v.cache_name) for p, v in variants.items()}
    by_prefix: dict[str, Likelihoods] = {}
    origins: dict[str, Mapping[str, str]] = {}
    for prefix, variant in variants.items():
        private = variant.reference is None
        entry = None if variant.cache_name is None else cache.read(keys[prefix], private)
        if entry is not None:
            by_prefix[prefix] = Likelihoods(**entry.tensors)
            if not private:
                origins[prefix] = entry.origin
    missing = {prefix: variant for prefix, variant in variants.items() if prefix not in by_prefix}
    for prepared, group in by_model(model, missing):
        measured = _measure(prepared, pairs, group, batch_tokens, progress)
        for prefix, likelihoods in measured.items():
            if group[prefix].cache_name is not None:
                cache.write(keys[prefix], vars(likelihoods), group[prefix].reference is None)
        by_prefix |= measured
    return by_prefix, origins


def hash_pairs(pairs: Sequence[Pair]) -> str:
    """A hash of the tokens of all pairs, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for context, continuation in pairs:
        digest.update(f"{list(context)}{list(continuation)}".encode())
    return digest.hexdigest()


@torch.no_grad()
def _measure(
    model: Model,
    pairs: Sequence[Pair],
    variants: Mapping[str, Variant],
    batch_tokens: int,
    progress: Callable[[int], Callable[[], None]],
) -> dict[str, Likelihoods]:
    inputs = _inputs(pairs, model.positions)
    passes = list(_passes(_batches(inputs, batch_tokens), _tokens_per_pass(model, len(variants))))
    advance = progress(model.depth * len(passes))
    out = {
        prefix: Likelihoods(torch.zeros(len(pairs), dtype=torch.float64), torch.ones(len(pairs), dtype=torch.bool))
        for prefix in variants
    }
    functions = {prefix: variant.function_of for prefix, variant in variants.items()}
    for everyone in passes:
        batches = everyone[processes.share(len(everyone))]
        ids = [_padded(batch) for batch in batches]
        streams = run_blocks(model, dict.fromkeys(variants, ids), functions, advance)
        for prefix, stream in streams.items():
            for batch, hidden in zip(batches, stream, strict=True):
                _read_off(model, batch, hidden, out[prefix])
    for likelihoods in out.values():
        processes.add(likelihoods.log_likelihood)
        likelihoods.greedy.copy_(processes.least(likelihoods.greedy.byte()))
    return out


def _inputs(pairs: Sequence[Pair], limit: int | None) -> list[_Input]:
    """Return what has to be read, the longest first; pairs that differ in their last token only share one reading."""
    inputs: dict[tuple[int, ...], _Input] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not continuation or (limit is not None and len(continuation) > limit):
            raise InputError(
                f"an answer of {len(continuation)} tokens cannot be scored by a model of {limit} positions; "
                "leave out its task"
            )
        tokens = (*context, *continuation)
        tokens = tokens[:-1] if limit is None else tokens[-(limit + 1) :][:-1]
        inputs.setdefault(tokens, _Input(tokens, [])).pairs.append((index, continuation))
    return sorted(inputs.values(), key=lambda item: -len(item.tokens))


def _batches(inputs: Sequence[_Input], batch_tokens: int) -> Iterator[list[_Input]]:
    start = 0
    while start < len(inputs):
        count = max(1, batch_tokens // len(inputs[start].tokens))
        yield list(inputs[start : start + count])
        start += count


def _passes(batches: Iterator[list[_Input]], tokens: int) -> Iterator[list[list[_Input]]]:
    pass_batches: list[list[_Input]] = []
    size = 0
    for batch in batches:
        width = len(batch) * len(batch[0].tokens)
        if pass_batches and size + width > tokens:
            yield pass_batches
            pass_batches, size = [], 0
        pass_batches.append(batch)
        size += width
    if pass_batches:
        yield pass_batches


def _tokens_per_pass(model: Model, variants: int) -> int:
    return max(1, _STREAM_BYTES // (model.config.hidden_size * model.dtype.itemsize * variants))


def _padded(batch: Sequence[_Input]) -> Tensor:
    # Attention is causal: what stands to the right of a sequence's end changes nothing before it.
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(item.tokens) for item in batch], batch_first=True)


def _read_off(model: Model, batch: Sequence[_Input], hidden: Tensor, out: Likelihoods) -> None:
    """Write the likelihoods of a batch's pairs, given what left the last block `(B, T, d)`."""
    rows, places, targets, owners = [], [], [], []
    for row, item in enumerate(batch):
        for index, continuation in item.pairs:
            end = len(item.tokens)
            rows += [row] * len(continuation)
            places += range(end - len(continuation), end)
            targets += continuation
            owners += [index] * len(continuation)
    states = hidden[torch.tensor(rows), torch.tensor(places)]
    answer, owner = torch.tensor(targets), torch.tensor(owners)
    at_once = max(1, _LOGITS // model.config.vocab_size)
    for start in range(0, len(answer), at_once):
        part = slice(start, start + at_once)
        predicted = model.logits(states[part]).log_softmax(-1)
        expected = answer[part].to(predicted.device)
        losses = predicted.gather(1, expected[:, None]).squeeze(1)
        out.log_likelihood.index_add_(0, owner[part], losses.double().cpu())
        wrong = (predicted.argmax(-1) != expected).cpu()
        out.greedy[owner[part][wrong]] = False
