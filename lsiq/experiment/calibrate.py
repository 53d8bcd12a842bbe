"""The sequences that a run calibrates on: drawn from a corpus, written by the model, or both."""

from __future__ import annotations

import torch
from torch import Tensor

from lsiq.calib.generated_text import write_sequences
from lsiq.data.token_cache import TokenRequest, cached_tokens
from lsiq.data.tokens import random_windows
from lsiq.experiment.config import RunConfig
from lsiq.models.loading import Model
from lsiq.runtime.cache import ContentCache
from lsiq.runtime.sources import source_hash

# Sequences that suffice to report block errors where a method needs none.
SAMPLES_TO_MEASURE = 8


def calibration_tokens(
    config: RunConfig, model: Model, tokens: ContentCache, references: ContentCache
) -> Tensor | None:
    """Draw the calibration windows `(samples + written, seqlen)`, those that the model writes last; None for no data.

    What was drawn or written before is taken from the caches, of tokens and of what this model did.

    A method that needs no data gets few: they only measure the error of each block.
    """
    parts = []
    if config.calib.corpus is not None:
        parts.append(drawn_tokens(config, model, tokens, limit=None if config.method.needs else SAMPLES_TO_MEASURE))
    if config.calib.written and (config.method.needs or not parts):
        count = config.calib.written if config.method.needs else min(config.calib.written, SAMPLES_TO_MEASURE)
        wanted = {"count": count, "seqlen": config.calib.seqlen, "seed": config.seed}
        key = references.key(kind="written", **wanted, source=source_hash("calib"))
        written = references.once(
            key, "sequences that the model writes", lambda: {"tokens": write_sequences(model, **wanted)}
        )
        parts.append(written["tokens"])
    return torch.cat(parts) if parts else None


def drawn_tokens(config: RunConfig, model: Model, cache: ContentCache, limit: int | None) -> Tensor:
    """Draw `(samples, seqlen)` token ids from the calibration corpus, at most `limit` sequences."""
    calib = config.calib
    samples = calib.samples if limit is None else min(calib.samples, limit)
    if calib.corpus == "random":
        return random_windows(model.config.vocab_size, samples, calib.seqlen, config.seed)
    assert calib.corpus is not None
    fields = tuple(calib.fields)
    request = TokenRequest(
        calib.corpus, "calibration", calib.path, fields, calib.seqlen, samples, config.seed, calib.windows
    )
    return cached_tokens(request, model.tokenizer, cache)
