"""The model prepared as a whole, before its first block is quantised."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lsiq.calib.cache_range import with_float_scales
from lsiq.formats.quant import QuantSettings
from lsiq.methods.base import Method, ModelMethod, WholeMethod, chain
from lsiq.models.loading import Model
from lsiq.models.outside import outside_modules, with_rounded_outside
from lsiq.results.memory_store import MemoryStore
from lsiq.results.store import DAMAGED, BlockStore
from lsiq.runtime import processes


def prepare(
    method: Method | WholeMethod,
    quant: QuantSettings,
    model: Model,
    tokens: Tensor | None,
    batch: int,
    seed: int,
    store: BlockStore | MemoryStore,
) -> Model:
    """Return the model that is quantised: rotated or after a prefix, where a method in the chain asks for it.

    Calibrated scales of keys and values are those of the float model as the checkpoint has it. All is kept in `store`,
    and taken from there where it was made before.

    Args:
        tokens: `(N, T)` calibration tokens, or None.
        batch: sequences that pass through a block at once.
    """
    if quant.name == "fp16":
        return model  # nothing is quantised
    outside_modules(model, quant.outside())  # what does not fit is said before anything is made
    if processes.first():
        store.open()
    if processes.from_first(store.model_digest() not in ("", DAMAGED)):
        return restored(model, quant, store)
    scales = with_float_scales(model, quant.kv, tokens, batch).cache_scales
    for position, link in enumerate(chain(method)):
        if isinstance(link, ModelMethod):
            generator = torch.Generator().manual_seed(seed * 100_003 + 50_021 + position)
            model = link.prepare_model(model, tokens, batch, generator)
    if scales is not None:
        model = replace(model, cache_scales=scales)
    if processes.first():
        store.write_model(model)
    processes.wait()
    return with_rounded_outside(model, quant.outside())


def restored(model: Model, quant: QuantSettings, store: BlockStore | MemoryStore) -> Model:
    """Return the model as the blocks in `store` want it, embeddings and head rounded where they have a format."""
    return with_rounded_outside(store.read_model(model), quant.outside())
