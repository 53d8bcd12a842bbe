"""What families write to GGUF beside LLaMA's settings, and what a reader of the file would not know of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lsiq.errors import ConfigError
from lsiq.export.gguf_types import ARCHITECTURES
from lsiq.models.gguf_rope import GEMMA3_WINDOW_BASE

_OTHERS = "use export=compressed-tensors, gptq or plain"
# What transformers, which reads every export back, takes for granted of these families; llama.cpp takes the same
# factor for scores, and reads the caps.
_GRANTED: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {"query_pre_attn_scalar": 256, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    "phi3": {},
}
# It builds these without biases whatever the file holds.
_WITHOUT_BIASES = {"llama": ("attention_bias", "mlp_bias"), "qwen3": ("attention_bias",)}
_PERIOD = {"gemma2": 2, "gemma3_text": 6}  # blocks of which the last attends to everything, the others to a window


def check_family(config: Any) -> None:
    """Raise ConfigError where llama.cpp has no place for the model, or a reader would take it for another."""
    family = config.model_type
    if family not in ARCHITECTURES:
        raise ConfigError(f"export=gguf: writes {', '.join(ARCHITECTURES)} models, not {family}; {_OTHERS}")
    for rope in _rotations(config).values():
        if (kind := rope.get("rope_type", "default")) != "default":
            raise ConfigError(f"export=gguf: rotary embeddings of type {kind} are not written yet; {_OTHERS}")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(f"export=gguf: partial rotary embeddings are not written yet; {_OTHERS}")
    granted = dict(_GRANTED.get(family, {})) | dict.fromkeys(_WITHOUT_BIASES.get(family, ()), False)
    if family in _PERIOD:
        places = range(1, config.num_hidden_layers + 1)
        granted["layer_types"] = [
            "sliding_attention" if place % _PERIOD[family] else "full_attention" for place in places
        ]
    given = {key: getattr(config, key) for key in granted}
    if family == "gemma3_text":
        granted["rope_theta of windows"] = GEMMA3_WINDOW_BASE
        given["rope_theta of windows"] = _rotations(config)["sliding_attention"]["rope_theta"]
    for key, value in granted.items():
        if given[key] != value:
            raise ConfigError(
                f"export=gguf: transformers, which reads the file back, takes {family} to have {key}={value}, not "
                f"{given[key]}; {_OTHERS}"
            )


def norm_offset(config: Any) -> float:
    """How much larger norms are in the file: Gemma adds 1 to them as it computes, llama.cpp does not."""
    return 1.0 if config.model_type in _PERIOD else 0.0


def positions(config: Any) -> int:
    """The positions of the file; of families whose windows llama.cpp leaves out, those within one window.

    There both are the same function.
    """
    window = getattr(config, "sliding_window", None)
    return (
        config.max_position_embeddings
        if config.model_type in _PERIOD or not window
        else min(config.max_position_embeddings, window)
    )


def rotary_base(config: Any) -> float:
    rotations = _rotations(config)
    return float(rotations["full_attention" if "full_attention" in rotations else ""]["rope_theta"])


def add_family(writer: Any, config: Any) -> None:
    """Write windows, caps and the embedding of windows."""
    family = config.model_type
    if family not in _GRANTED:
        return
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    for name, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if getattr(config, name, None) is not None:
            add(getattr(config, name))
    if family == "gemma3_text":
        writer.add_rope_freq_base_swa(GEMMA3_WINDOW_BASE)


def _rotations(config: Any) -> Mapping[str, Mapping[str, Any]]:
    """The rotary embeddings by the kind of block, where there are several; else one without a name."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope if "full_attention" in rope else {"": rope}
