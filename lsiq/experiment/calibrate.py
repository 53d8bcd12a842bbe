"""The sequences that a run calibrates on: drawn from corpora, written by the model, or both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lsiq.calib.generated_text import write_sequences
from lsiq.data.conversations import read_conversations
from lsiq.data.corpora import HUB, read_corpus
from lsiq.data.documents import read_documents
from lsiq.data.settings import CalibSettings, Share
from lsiq.data.token_cache import TokenRequest, cached_tokens
from lsiq.data.tokens import random_windows
from lsiq.models.loading import Model
from lsiq.runtime.cache import ContentCache
from lsiq.runtime.sources import source_hash

if TYPE_CHECKING:
    from lsiq.experiment.config import RunConfig

# Sequences that suffice to report block errors where a method needs none.
SAMPLES_TO_MEASURE = 8
NOTHING_KEPT = ContentCache(None, {}, {})
# Running text has fewer characters per token than this, so a longer text holds the windows without being counted.
CHARACTERS_PER_TOKEN = 8


def calibration_tokens(
    calib: CalibSettings,
    model: Model,
    seed: int,
    limit: int | None = None,
    tokens: ContentCache = NOTHING_KEPT,
    references: ContentCache = NOTHING_KEPT,
) -> Tensor | None:
    """Draw the calibration windows `(samples + written, seqlen)`, those that the model writes last; None for no data.

    Args:
        limit: sequences at most, drawn ones first: enough to measure the error of each block where a method needs
            none; None for all.
        tokens: what was drawn before.
        references: what this model wrote before.

    Raises:
        LsiqError: a text cannot be read, is too short, or does not fit the tokenizer.
    """
    parts = []
    if calib.corpus is not None:
        parts.append(drawn_tokens(calib, model, seed, limit, tokens))
    if calib.written and (limit is None or not parts):
        count = calib.written if limit is None else min(calib.written, limit)
        request = {"count": count, "seqlen": calib.seqlen, "seed": seed}
        key = references.key(kind="written", **request, source=source_hash("calib"))
        generated = references.once(
            key, "sequences that the model writes", lambda: {"tokens": write_sequences(model, **request)}
        )
        parts.append(generated["tokens"])
    return torch.cat(parts) if parts else None


def drawn_tokens(calib: CalibSettings, model: Model, seed: int, limit: int | None, cache: ContentCache) -> Tensor:
    """Draw `(samples, seqlen)` token ids from the calibration corpora, at most `limit` sequences.

    Those of a mixture are shuffled, so that corpora meet in batches and in every process's share.
    """
    shares = calib.shares(limit)
    tokens = torch.cat([_draw(share, calib, model, seed, cache) for share in shares])
    if len(shares) == 1:
        return tokens
    random = np.random.default_rng([seed, calib.seqlen, len(tokens)])
    return tokens[torch.from_numpy(random.permutation(len(tokens)))]


def sample_limit(config: RunConfig) -> int | None:
    """Return how many sequences a run draws at most: few where they only measure errors; None for all."""
    return None if config.calibrates else SAMPLES_TO_MEASURE


def check_texts(config: RunConfig, model: Model) -> None:
    """Raise InputError where a text at hand holds fewer disjoint windows than the run would draw of it."""
    calib = config.calib
    for share in calib.shares(sample_limit(config)) if calib.windows == "disjoint" else []:
        if share.corpus == "random" or (share.corpus in HUB and share.path is None):
            continue
        enough, characters = CHARACTERS_PER_TOKEN * share.samples * calib.seqlen, 0
        for length in _lengths(share, calib):
            characters += length
            if characters >= enough:
                break
        else:
            _draw(share, calib, model, 0, NOTHING_KEPT)


def _lengths(share: Share, calib: CalibSettings) -> Iterator[int]:
    """Yield how many characters the pieces of a text have; of a user's file no more is read than is asked for."""
    if share.template:
        assert share.path is not None  # the settings see to it
        for conversation in read_conversations(share.path):
            yield sum(len(message["content"]) for message in conversation.messages)
    elif share.corpus == "file":
        assert share.path is not None
        yield from map(len, read_documents(share.path, tuple(calib.fields)))
    else:
        yield from map(len, read_corpus(share.corpus, "calibration", share.path, calib.fields).documents)


def _draw(share: Share, calib: CalibSettings, model: Model, seed: int, cache: ContentCache) -> Tensor:
    if share.corpus == "random":
        return random_windows(model.config.vocab_size, share.samples, calib.seqlen, seed)
    request = TokenRequest(
        share.corpus,
        "calibration",
        share.path,
        tuple(calib.fields),
        calib.seqlen,
        share.samples,
        seed,
        calib.windows,
        share.template,
    )
    return cached_tokens(request, model.tokenizer, cache)
