"""How the quantised model differs from the float one outside its blocks, as named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lsiq.formats.cache_scales import CacheScales
from lsiq.models.loading import Model

# What only a program that knows of it could run the blocks with.
_CHANGES = ("residual", "prefix")


def to_tensors(model: Model) -> dict[str, Tensor]:
    """Return what is kept of a prepared model: nothing, for most methods."""
    tensors: dict[str, Tensor] = {}
    if model.residual is not None:
        tensors["residual"] = model.residual
    if model.prefix is not None:
        tensors["prefix"] = model.prefix.tokens
    if model.cache_scales is not None:
        tensors["cache_scales"] = torch.stack([scales.tensor() for scales in model.cache_scales])
    return tensors


def as_prepared(model: Model, tensors: Mapping[str, Tensor]) -> Model:
    """Return the float model as it was when `to_tensors` made these of it."""
    if (residual := tensors.get("residual")) is not None:
        model = replace(model, residual=residual.to(model.device))
    if (scales := tensors.get("cache_scales")) is not None:
        model = replace(model, cache_scales=tuple(CacheScales.of(pair) for pair in scales))
    return model if (prefix := tensors.get("prefix")) is None else model.with_prefix(prefix)


def changes_model(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the blocks make a model only with a rotated residual stream or after a prefix."""
    return any(name in tensors for name in _CHANGES)
