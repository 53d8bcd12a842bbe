"""Perplexity and divergence of several models on several corpora, in one pass over the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lsiq.data.tokens import token_hash
from lsiq.evals.block_pass import FunctionOf, run_blocks
from lsiq.evals.perplexity import TokenScores, score_tokens
from lsiq.models.loading import Model
from lsiq.runtime import processes
from lsiq.runtime.cache import ContentCache
from lsiq.runtime.files import replacing

FLOAT = "float/"
# What the float model leaves its last block with is kept for later comparisons up to this size; a larger model runs
# along again where divergences are wanted.
STATES_BYTES = 2**30
QUANTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class Variant:
    """One of the models that are measured side by side.

    Attributes:
        function_of: turns a float block into the one to run.
        reference: what it is, for the cache; None for the model under test, which is never taken from there.
        stored: what names the model under test among what the run keeps of its own measurements; None keeps none.
        prepared: the model whose float blocks these are, where its residual stream is rotated or a prefix stands before
            every sequence; None for the float model as it is.
    """

    function_of: FunctionOf
    reference: str | None = None
    prepared: Model | None = None
    stored: str | None = None

    @property
    def cache_name(self) -> str | None:
        """What it is called among what was measured before, be that shared or the run's own."""
        return self.reference or self.stored


@dataclass(frozen=True)
class Measured:
    """The scores of one model on one corpus, and where they come from if not from this run."""

    scores: TokenScores
    origin: Mapping[str, str] | None = None

    def window_losses(self) -> Tensor:
        """Mean loss `(N,)` of each window, nats per predicted token."""
        return self.scores.losses.double().mean(1)


def by_model(model: Model, variants: Mapping[str, Variant]) -> list[tuple[Model, dict[str, Variant]]]:
    """Return the variants by the model whose float blocks they are made of, `model` unless they name another one."""
    groups: dict[int, tuple[Model, dict[str, Variant]]] = {}
    for prefix, variant in variants.items():
        prepared = variant.prepared or model
        groups.setdefault(id(prepared), (prepared, {}))[1][prefix] = variant
    return list(groups.values())


def measure_windows(
    model: Model,
    windows: Mapping[str, Tensor],
    variants: Mapping[str, Variant],
    batch: int,
    divergence: bool,
    cache: ContentCache,
    advance: Callable[[], None],
) -> dict[str, dict[str, Measured]]:
    """Return, by corpus and model, what each model says of the corpus' windows `(N, T)`.

    Of several processes each runs its share of every corpus' batches, and all get what all found.

    Args:
        variants: by the prefix of their metrics; `float/` is among them.
        batch: windows that pass through a block at once.
        divergence: whether the others are compared with the float model token by token.
        advance: called after each block of each pass; there is none where everything was measured before.
    """
    shares = {corpus: processes.share(-(-len(ids) // batch)) for corpus, ids in windows.items()}
    batches = {corpus: ids.split(batch)[shares[corpus]] for corpus, ids in windows.items()}
    heads = {
        prefix: replace(model, skeleton=variant.prepared.skeleton)
        for prefix, variant in variants.items()
        if variant.prepared is not None and variant.prepared.float_skeleton is not None
    }
    shelf = _Shelf(cache, windows, divergence)
    results = {corpus: shelf.take(corpus, variants) for corpus in windows}
    states = {corpus: shelf.states(corpus) if divergence else None for corpus in windows}
    to_run = {corpus: _to_run(variants, results[corpus], divergence and states[corpus] is None) for corpus in windows}
    for corpus, streams in _run(model, batches, variants, to_run, advance).items():
        if FLOAT in streams:
            shelf.keep_states(corpus, streams[FLOAT])
        elif (reference_states := states[corpus]) is not None:
            streams[FLOAT] = list(reference_states.split(batch)[shares[corpus]])
        reference = FLOAT if divergence else None
        scored = score_tokens(model, batches[corpus], streams, reference, heads) if batches[corpus] else {}
        scored = _join(processes.gather(scored))
        for prefix in to_run[corpus]:
            results[corpus][prefix] = Measured(scored[prefix])
            shelf.put(corpus, variants[prefix], scored[prefix])
    return {corpus: {prefix: results[corpus][prefix] for prefix in variants} for corpus in windows}


def _join(parts: Sequence[Mapping[str, TokenScores]]) -> dict[str, TokenScores]:
    """Put together, by model, what several processes found of their windows."""
    nonempty = [part for part in parts if part]
    scores = {}
    for prefix, first in nonempty[0].items():
        names = [name for name, tensor in vars(first).items() if tensor is not None]
        scores[prefix] = TokenScores(
            **{name: torch.cat([vars(part[prefix])[name] for part in nonempty]) for name in names}
        )
    return scores


def _to_run(variants: Mapping[str, Variant], results: Mapping[str, Measured], wants_float: bool) -> list[str]:
    missing = [prefix for prefix in variants if prefix not in results]
    if missing and wants_float and FLOAT not in missing:
        missing.insert(0, FLOAT)
    return missing


def _run(
    model: Model,
    batches: Mapping[str, Sequence[Tensor]],
    variants: Mapping[str, Variant],
    to_run: Mapping[str, Sequence[str]],
    advance: Callable[[], None],
) -> dict[str, dict[str, list[Tensor]]]:
    """Return, by corpus and model, what leaves the last block, in the coordinates of the float model.

    All corpora share one pass over the weights, and so do all variants that are made of one model's blocks.
    """
    reads = {prefix: [corpus for corpus in batches if prefix in to_run[corpus]] for prefix in variants}
    reads = {prefix: corpora for prefix, corpora in reads.items() if corpora}
    if not reads:
        return {}
    inputs = {prefix: [part for corpus in corpora for part in batches[corpus]] for prefix, corpora in reads.items()}
    streams: dict[str, list[Tensor]] = {}
    for prepared, group in by_model(model, {prefix: variants[prefix] for prefix in reads}):
        functions = {prefix: variant.function_of for prefix, variant in group.items()}
        outputs = run_blocks(prepared, {prefix: inputs[prefix] for prefix in group}, functions, advance)
        streams |= {prefix: [prepared.rotated_back(part) for part in stream] for prefix, stream in outputs.items()}
    by_corpus: dict[str, dict[str, list[Tensor]]] = {corpus: {} for corpus in batches if to_run[corpus]}
    for prefix, corpora in reads.items():
        for corpus in corpora:
            count = len(batches[corpus])
            by_corpus[corpus][prefix], streams[prefix] = streams[prefix][:count], streams[prefix][count:]
    return by_corpus


@contextlib.contextmanager
def references_once(
    windows: Mapping[str, Tensor], variants: Mapping[str, Variant], divergence: bool, cache: ContentCache
) -> Iterator[None]:
    """Keep other processes from measuring the same references, if the cache lacks them, while the `with` lasts.

    References are waited for in the order of `variants`, which is the same in every process.
    """
    shelf = _Shelf(cache, windows, divergence)
    with contextlib.ExitStack() as stack:
        for variant in variants.values():
            if variant.reference is None or shelf.holds(variant.reference):
                continue
            lock = contextlib.ExitStack()
            lock.enter_context(shelf.alone(variant.reference))
            if shelf.holds(variant.reference):  # another process has measured it meanwhile
                lock.close()
            else:
                stack.push(lock)
        yield


class _Shelf:
    """What the cache holds of the float model and other references on these windows."""

    def __init__(self, cache: ContentCache, windows: Mapping[str, Tensor], divergence: bool) -> None:
        self._cache, self._divergence = cache, divergence
        self._tokens = {
            corpus: {"corpus": corpus, "tokens": token_hash(ids), "seqlen": ids.shape[1]}
            for corpus, ids in windows.items()
        }

    def take(self, corpus: str, variants: Mapping[str, Variant]) -> dict[str, Measured]:
        """Return by prefix what was measured before; a comparison counts only where all of it is there."""
        results = {}
        for prefix, variant in variants.items():
            if variant.cache_name is None:
                continue
            private = variant.reference is None
            entry = self._cache.read(self._key(corpus, variant.cache_name), private)
            if entry is not None:
                results[prefix] = Measured(TokenScores(**entry.tensors), None if private else entry.origin)
        return results

    def holds(self, reference: str) -> bool:
        """Whether the scores of a reference are there for all corpora."""
        return all(self._cache.has(self._key(corpus, reference)) for corpus in self._tokens)

    def alone(self, reference: str) -> contextlib.AbstractContextManager[None]:
        """Keep other processes from measuring `reference` on these corpora."""
        key = self._cache.key(corpora=[self._key(corpus, reference) for corpus in self._tokens], kind="lock")
        return self._cache.alone(key, f"perplexity of {reference}")

    def put(self, corpus: str, variant: Variant, scores: TokenScores) -> None:
        if variant.cache_name is not None:
            tensors = {name: tensor for name, tensor in vars(scores).items() if tensor is not None}
            self._cache.write(self._key(corpus, variant.cache_name), tensors, variant.reference is None)

    def states(self, corpus: str) -> Tensor | None:
        """Return what the float model left its last block with, `(N, T, d)`."""
        entry = self._cache.read(self._cache.key(**self._tokens[corpus], kind="states"))
        return None if entry is None else entry.tensors["states"]

    def keep_states(self, corpus: str, batches: Sequence[Tensor]) -> None:
        if self._divergence and processes.add_number(sum(part.nbytes for part in batches)) <= STATES_BYTES:
            states = torch.cat([part.cpu() for share in processes.gather(list(batches)) for part in share])
            self._cache.write(self._cache.key(**self._tokens[corpus], kind="states"), {"states": states})

    def _key(self, corpus: str, reference: str) -> str:
        # The float model's own scores are the same with and without comparisons.
        compared = self._divergence and reference != "float"
        return self._cache.key(**self._tokens[corpus], kind="scores", reference=reference, compared=compared)


def divergence_metrics(scores: TokenScores, float_losses: Tensor) -> dict[str, float]:
    """Return the mean divergence from the float model, how often both agree, and how token losses changed.

    `kl` in nats; `top1` the share of tokens at which both models find the same token most likely; `loss_change_qNN`
    the NN-th percentile of a token's loss minus its loss under the float model, in nats.
    """
    if scores.divergence is None or scores.agrees is None:
        return {}
    changes = np.percentile((scores.losses - float_losses).double().numpy(), QUANTILES)
    metrics = {
        "kl": scores.divergence.double().mean().item(),
        "top1": scores.agrees.double().mean().item(),
    }
    return metrics | {f"loss_change_q{q:02d}": float(change) for q, change in zip(QUANTILES, changes, strict=True)}


def write_windows(folder: Path, measured: Mapping[str, Mapping[str, Measured]], seqlen: int) -> None:
    """Write `folder/windows.parquet`: a row for each window with its mean loss under each model.

    Columns: `key` (corpus@seqlen), `window`, `loss`, `kl` of the model under test, and `float_loss`, `rtn_loss`,
    `prefixed_loss` where those were measured.
    """
    import pandas  # half a second that a dry run does without

    frames = []
    for corpus, models in measured.items():
        columns = {
            f"{prefix.replace('/', '_')}loss": scores.window_losses().numpy() for prefix, scores in models.items()
        }
        under_test = models.get("", models[FLOAT])
        columns["loss"] = under_test.window_losses().numpy()
        if under_test.scores.divergence is not None:
            columns["kl"] = under_test.scores.divergence.double().mean(1).numpy()
        frame = pandas.DataFrame(columns)
        frame.insert(0, "window", np.arange(len(frame)))
        frame.insert(0, "key", f"{corpus}@{seqlen}")
        frames.append(frame)
    if frames:
        with replacing(folder / "windows.parquet") as partial:
            pandas.concat(frames, ignore_index=True).to_parquet(partial, index=False)
