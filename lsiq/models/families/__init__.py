"""The model families that the package knows: each is one file of this folder."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from lsiq.errors import InputError
from lsiq.models.spec import ModelSpec
from lsiq.runtime import plugins

# What the configuration of a model has that no family here has, by the keys that say so.
_OTHER_KINDS = {
    "a mixture of experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "a hybrid with state-space or recurrent blocks": (
        *("layers_block_type", "hybrid_override_pattern", "attn_layer_period", "attn_layer_indices"),
        *("mamba_d_state", "mamba_expand", "ssm_state_size", "linear_num_value_heads", "lru_width", "conv_L_cache"),
    ),
    "a state-space model": ("state_size", "time_step_rank"),
    "multimodal": ("vision_config", "audio_config", "vision_tower", "mm_vision_tower"),
    "a model with embeddings in every block": ("hidden_size_per_layer_input",),
}


def refuse_other_kinds(raw: Mapping[str, Any], where: str) -> None:
    """Raise InputError for a configuration of a mixture of experts, a hybrid or a multimodal model."""
    for kind, keys in _OTHER_KINDS.items():
        if any(raw.get(key) not in (None, 0, 1, [], {}) for key in keys):
            raise InputError(
                f"{where}: model_type={raw.get('model_type')} is not supported, for it is {kind}; "
                f"only dense text models are: {', '.join(families())}"
            )


def find_spec(model_type: str, where: str) -> ModelSpec:
    """Return the spec of a family.

    Raises:
        InputError: the family is not supported.
    """
    specs = families()
    if model_type not in specs:
        raise InputError(f"{where}: model_type={model_type} is not supported; there are {', '.join(specs)}")
    return specs[model_type]


def families() -> dict[str, ModelSpec]:
    """Return what is known of each family, by `config.model_type`: every `ModelSpec` here and of plug-ins."""
    bundled = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    values = (value for module in (*bundled, *plugins.modules()) for value in vars(module).values())
    specs = (value for value in values if isinstance(value, ModelSpec))
    return {spec.model_type: spec for spec in specs}
