"""Embeddings and head rounded to nearest: what lies outside the blocks, where a rule gives it a format."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from lsiq.errors import ConfigError
from lsiq.formats.mixed import EMBEDDING, HEAD
from lsiq.formats.tensor import quantize

if TYPE_CHECKING:
    from lsiq.formats.base import WeightFormat
    from lsiq.models.loading import Model


def outside_modules(model: Model, formats: Mapping[str, WeightFormat]) -> dict[str, tuple[Any, WeightFormat]]:
    """Return the modules outside the blocks that have a format, by name; a head that is the embeddings only once.

    Raises:
        ConfigError: head and embeddings are one matrix, and two formats are asked for; or one does not fit.
    """
    skeleton: Any = model.skeleton
    modules = {EMBEDDING: skeleton.get_input_embeddings(), HEAD: skeleton.get_output_embeddings()}
    if modules[EMBEDDING].weight is modules[HEAD].weight and formats:
        if len(set(formats.values())) > 1:
            raise ConfigError(
                f"quant.rules: {HEAD} and {EMBEDDING} of this model are one matrix and cannot have two formats; give "
                "one of them a rule, or both the same format"
            )
        formats = {EMBEDDING: next(iter(formats.values()))}
    for name, fmt in formats.items():
        fmt.check(modules[name].weight.shape[1], name)
    return {name: (modules[name], fmt) for name, fmt in formats.items()}


def with_rounded_outside(model: Model, formats: Mapping[str, WeightFormat]) -> Model:
    """Return the model with embeddings and head on the grids of their formats; `model` itself where there are none.

    Each row, a token's, has its scales. A head that is the embeddings stays it.
    """
    if not formats:
        return model
    modules = outside_modules(model, formats)
    tensors = [*model.skeleton.parameters(), *model.skeleton.buffers()]
    skeleton = copy.deepcopy(model.skeleton, {id(tensor): tensor for tensor in tensors})  # tensors are shared
    places = dict(model.skeleton.named_modules())
    for name, (module, fmt) in modules.items():
        weight = quantize(module.weight.detach().float(), fmt, name).decode().to(module.weight.dtype)
        rounded = nn.Parameter(weight, requires_grad=False)
        for place, candidate in places.items():
            if getattr(candidate, "weight", None) is module.weight:
                skeleton.get_submodule(place).weight = rounded
    return replace(model, skeleton=skeleton, float_skeleton=model.skeleton)
