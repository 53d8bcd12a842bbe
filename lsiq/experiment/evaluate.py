"""What a run measures: the float model, round-to-nearest and the quantised model, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lsiq.data.token_cache import TokenRequest, cached_tokens
from lsiq.data.tokens import random_windows, token_hash
from lsiq.evals.harness import measure_tasks
from lsiq.evals.tasks import Tasks
from lsiq.evals.windows import (
    FLOAT,
    Measured,
    Variant,
    by_model,
    divergence_metrics,
    measure_windows,
    references_once,
    write_windows,
)
from lsiq.experiment.config import RunConfig
from lsiq.formats.placed import PlacedQuant
from lsiq.formats.quant import QuantSettings
from lsiq.models.loading import Model
from lsiq.models.rounding import round_to_nearest
from lsiq.results.record import Record, write_record
from lsiq.results.store import BlockStore
from lsiq.runtime import processes
from lsiq.runtime.cache import ContentCache
from lsiq.runtime.precision import name_of
from lsiq.runtime.sources import source_hash
from lsiq.runtime.terminal import show_progress

# Where a run keeps what its own model scored until it is finished.
SCORES = "scores"

# What decides the scores of a reference model: they are measured again once its code has changed.
REFERENCES = ("evals", "formats", "linalg", "models")


def evaluate(
    config: RunConfig,
    model: Model,
    prepared: Model,
    windows: Mapping[str, Tensor],
    tasks: Tasks,
    store: BlockStore,
    record: Record,
) -> None:
    """Measure every model on every corpus and task, and write the numbers into `record`.

    Args:
        prepared: the model whose blocks are in `store`; `model` itself unless a method rotated it or gave it a prefix.
    """
    variants = variants_to_measure(config, model, prepared, store)
    folder = store.folder.parent
    cache = open_cache(config, model, record, folder / SCORES)
    if windows:
        once = references_once(windows, variants, config.eval.divergence, cache)
        with once, show_progress("evaluate", model.depth * len(by_model(model, variants))) as progress:
            measured = measure_windows(
                model, windows, variants, config.eval.batch, config.eval.divergence, cache, progress.advance
            )
        for corpus, results in measured.items():
            _report(f"{corpus}@{config.eval.seqlen}", windows[corpus], results, model, record)
        if processes.first():
            write_windows(folder, measured, config.eval.seqlen)
    if tasks:
        write_record(record, folder)  # they may take as long again, and not every run lives to see their end
        measure_tasks(tasks, config.eval, model, variants, cache, folder, record)


def variants_to_measure(config: RunConfig, model: Model, prepared: Model, store: BlockStore) -> dict[str, Variant]:
    """Return the models to measure, by the prefix of their metrics.

    The float model and round-to-nearest are measured as the checkpoint has them, the method's blocks in the model
    that was prepared for them. A prefix also changes the float model; what it does there is `prefixed/`.
    """
    quant = config.quant
    floats = None if _moved(prepared) or prepared.float_skeleton is not None else prepared
    variants = {FLOAT: Variant(lambda block: block.with_weights({}), "float", floats)}
    if quant.name == "fp16":
        return variants
    if config.eval.rtn and config.method.name != "rtn":
        variants["rtn/"] = Variant(
            lambda block: block.with_result(round_to_nearest(block, quant), quant.running),
            f"rtn {_weights_of(quant)} {quant.running}{_scales_of(prepared)}",
            prepared=_at_nearest(model, prepared),
        )
    if prepared.prefix is not None:
        variants["prefixed/"] = Variant(
            lambda block: block.with_weights({}), prepared=prepared.as_float, stored=f"prefixed {store.stamp}"
        )
    variants[""] = Variant(
        lambda block: block.with_result(store.read(block.index), quant.running),
        prepared=prepared,
        stored=f"own {store.stamp}",
    )
    return variants


def _moved(prepared: Model) -> bool:
    """Whether the blocks of a prepared model are others than the float model's: rotated, or after a prefix."""
    return prepared.residual is not None or prepared.prefix is not None


def _at_nearest(model: Model, prepared: Model) -> Model | None:
    """Return what round-to-nearest is measured in: neither rotated nor after a prefix, but otherwise as prepared.

    Where `prepared` is that already, one pass over the weights serves both. None for `model` as it is.
    """
    if not _moved(prepared):
        return prepared
    if prepared.float_skeleton is None and prepared.cache_scales is None:
        return None
    float_skeleton = None if prepared.float_skeleton is None else model.skeleton
    return replace(model, skeleton=prepared.skeleton, float_skeleton=float_skeleton, cache_scales=prepared.cache_scales)


def _scales_of(prepared: Model) -> str:
    """Name calibrated scales of keys and values, for the cache."""
    return "" if prepared.cache_scales is None else f" {prepared.cache_scales}"


def _weights_of(quant: QuantSettings) -> str:
    """Name the weight formats of all linears, for the cache."""
    return str(sorted(quant.layers.items())) if isinstance(quant, PlacedQuant) else str(quant.weight)


def open_cache(config: RunConfig, model: Model, record: Record, run_folder: Path | None = None) -> ContentCache:
    """Open the cache of reference measurements for this model on this machine, and of the run's own in `run_folder`."""
    # Random weights have no content to hash: their shape and seed say which they are.
    weights = record.inputs.get("model") or f"random {config.seed} {model.config.to_json_string()}"
    identity: dict[str, Any] = {
        "sources": source_hash(*REFERENCES),
        "model": weights,
        "outliers": [config.model.outliers, config.model.outlier_strength] if config.model.outliers else None,
        "dtype": name_of(model.dtype),
        "batch": config.eval.batch,
        "machine": {name: record.machine.get(name) for name in ("device", "gpu")},
        "versions": {name: record.versions.get(name) for name in ("torch", "transformers")},
    }
    folder = None if config.paths.cache is None else Path(config.paths.cache).expanduser()
    return ContentCache(folder, identity, {"run": record.run_id, "created": record.created}, run_folder=run_folder)


def _report(key: str, tokens: Tensor, results: Mapping[str, Measured], model: Model, record: Record) -> None:
    """Write what was measured on one corpus into the record."""
    reference = results[FLOAT]
    for prefix, measured in {**results, "": results.get("", reference)}.items():
        perplexity = measured.scores.perplexity()
        record.metrics[f"{prefix}ppl/{key}"] = perplexity.value
        if prefix != FLOAT:
            record.metrics[f"{prefix}excess/{key}"] = perplexity.loss - reference.scores.perplexity().loss
            compared = divergence_metrics(measured.scores, reference.scores.losses)
            record.metrics |= {f"{prefix}{name}/{key}": value for name, value in compared.items()}
        if measured.origin is not None:
            record.cached[f"{prefix}ppl/{key}"] = dict(measured.origin)
    perplexity = reference.scores.perplexity()
    record.protocol[f"ppl/{key}"] = {
        "windows": perplexity.windows,
        "predicted_tokens": perplexity.tokens,
        "tokens": token_hash(tokens),
        "dtype": name_of(model.dtype),
    }


def evaluation_windows(config: RunConfig, model: Model, cache: ContentCache) -> dict[str, Tensor]:
    """Cut the evaluation windows `(N, seqlen)` of every corpus, or take them from the cache of tokens."""
    windows: dict[str, Tensor] = {}
    for corpus in config.eval.corpora:
        if corpus == "random":
            windows[corpus] = random_windows(model.config.vocab_size, config.eval.windows or 16, config.eval.seqlen, 1)
            continue
        path = config.eval.path if corpus == "file" else config.eval.local.get(corpus)
        request = TokenRequest(corpus, "evaluation", path, tuple(config.eval.fields), config.eval.seqlen)
        windows[corpus] = cached_tokens(request, model.tokenizer, cache)[: config.eval.windows]
    return windows
