"""Embeddings and head rounded to nearest: what lies outside the blocks, where a rule gives it a format."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lsiq.errors import ConfigError
from lsiq.formats.fit import check_format
from lsiq.formats.mixed import EMBEDDING, HEAD
from lsiq.formats.tensor import QuantizedTensor, quantize

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
    if is_tied(model) and formats:
        if len(set(formats.values())) > 1:
            raise ConfigError(
                f"quant.rules: {HEAD} and {EMBEDDING} of this model are one matrix and cannot have two formats; give "
                "one of them a rule, or both the same format"
            )
        formats = {EMBEDDING: next(iter(formats.values()))}
    for name, fmt in formats.items():
        width = modules[name].weight.shape[1]
        check_format(fmt, {f"in_features={width} of {name}": width})
    return {name: (modules[name], fmt) for name, fmt in formats.items()}


def is_tied(model: Model) -> bool:
    """Whether head and embeddings are one matrix."""
    skeleton: Any = model.skeleton
    return skeleton.get_input_embeddings().weight is skeleton.get_output_embeddings().weight


def outside_names(model: Model, formats: Mapping[str, WeightFormat]) -> dict[str, WeightFormat]:
    """Return the formats of `outside_modules` by the names of the parameters, a tied head's that of the embeddings."""
    parameters = {id(parameter): name for name, parameter in model.skeleton.named_parameters()}
    return {parameters[id(module.weight)]: fmt for module, fmt in outside_modules(model, formats).values()}


def quantized_outside(model: Model, formats: Mapping[str, WeightFormat]) -> dict[str, QuantizedTensor]:
    """Return what `outside_names` names, rounded to nearest; each row, a token's, has its scales."""
    found = outside_names(model, formats)
    weights = {name: model.skeleton.get_parameter(name).detach() for name in found}
    return {name: quantize(weights[name].float(), fmt, name) for name, fmt in found.items()}


def with_rounded_outside(model: Model, formats: Mapping[str, WeightFormat]) -> Model:
    """Return the model with embeddings and head on the grids of their formats; `model` itself where there are none."""
    return with_outside(model, {name: w.decode() for name, w in quantized_outside(model, formats).items()})


def with_outside(model: Model, weights: Mapping[str, Tensor]) -> Model:
    """Return the model with other weights of embeddings and head, by their parameters; `model` where none are given.

    A head that is the embeddings stays it.
    """
    if not weights:
        return model
    tensors = [*model.skeleton.parameters(), *model.skeleton.buffers()]
    skeleton = copy.deepcopy(model.skeleton, {id(tensor): tensor for tensor in tensors})  # tensors are shared
    places = dict(model.skeleton.named_modules())
    for name, weight in weights.items():
        before = model.skeleton.get_parameter(name)
        rounded = nn.Parameter(weight.to(before.dtype), requires_grad=False)
        for place, candidate in places.items():
            if getattr(candidate, "weight", None) is before:
                skeleton.get_submodule(place).weight = rounded
    return replace(model, skeleton=skeleton, float_skeleton=model.skeleton)
