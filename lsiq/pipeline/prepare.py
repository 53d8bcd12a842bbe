"""The model prepared as a whole, before its first block is quantised."""

from __future__ import annotations

import torch
from torch import Tensor

from lsiq.formats.quant import QuantSettings
from lsiq.methods.base import Method, ModelMethod, WholeMethod, chain
from lsiq.models.loading import Model
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

    It is kept in `store`, and taken from there where it was made before.

    Args:
        tokens: `(N, T)` calibration tokens, or None.
        batch: sequences that pass through a block at once.
    """
    if quant.name == "fp16":
        return model  # nothing is quantised
    if processes.first():
        store.open()
    if processes.from_first(store.model_digest() not in ("", DAMAGED)):
        return store.read_model(model)
    for position, link in enumerate(chain(method)):
        if isinstance(link, ModelMethod):
            generator = torch.Generator().manual_seed(seed * 100_003 + 50_021 + position)
            model = link.prepare_model(model, tokens, batch, generator)
    if processes.first():
        store.write_model(model)
    processes.wait()
    return model
