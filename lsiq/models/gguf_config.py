"""The transformers configuration of a model in a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsiq.errors import InputError
from lsiq.models.gguf_file import Header, read_header
from lsiq.models.gguf_rope import gemma3_rope, phi3_rope, plain_rope

Settings = dict[str, Any]
_ATTENTION = {True: "sliding_attention", False: "full_attention"}
# Gemma-2's caps where a file of before August 2024 does not say them; as llama.cpp has them.
_CAPS = {"attn": 50.0, "final": 30.0}


def _llama(header: Header, config: Settings, path: Path) -> Settings:
    biases = {"attention_bias": "blk.0.attn_q.bias" in header.tensors}
    return biases | _qwen2(header, config, path)


def _qwen2(header: Header, config: Settings, path: Path) -> Settings:
    """Its projections always have biases."""
    head_dim = header.get("attention.key_length") or header.get("rope.dimension_count") or _even_width(config)
    return {"head_dim": head_dim, "rope_parameters": plain_rope(header, head_dim, path)}


def _gemma2(header: Header, config: Settings, path: Path) -> Settings:
    caps = {f"{place}_logit_softcapping": header.get(f"{place}_logit_softcapping", cap) for place, cap in _CAPS.items()}
    rope = {"rope_parameters": plain_rope(header, _head_dim(header, config), path)}
    return _gemma(header, config, large=46) | caps | rope


def _gemma3(header: Header, config: Settings, path: Path) -> Settings:
    pattern = header.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        layers: Settings = {"layer_types": [_ATTENTION[windowed] for windowed in pattern]}
    else:
        layers = {"sliding_window_pattern": pattern}
    cap = {"final_logit_softcapping": header.get("final_logit_softcapping")}
    return _gemma(header, config, large=62) | layers | cap | {"rope_parameters": gemma3_rope(header, path)}


def _gemma(header: Header, config: Settings, large: int) -> Settings:
    """What Gemma-2 and 3 share; `large` is the depth of the 27B model.

    No file says by what attention scores are divided. llama.cpp and this module take the root of the head's width, and
    for the 27B models that of the model's width by its heads. transformers takes 16 for all, which is right for the
    others.
    """
    head_dim = _head_dim(header, config)
    scalar = _even_width(config) if config["num_hidden_layers"] == large else head_dim
    window = header.metadata[f"{header.architecture}.attention.sliding_window"]
    return {"head_dim": head_dim, "query_pre_attn_scalar": scalar, "sliding_window": window}


def _phi3(header: Header, config: Settings, path: Path) -> Settings:
    rope = phi3_rope(header, _head_dim(header, config), path)
    trained = {key: rope[key] for key in ("original_max_position_embeddings",) if key in rope}
    window = header.get("attention.sliding_window") or None  # 0 stands for none
    return {"rope_parameters": rope, "sliding_window": window, **trained}


def _olmo2(header: Header, config: Settings, path: Path) -> Settings:
    if header.get("attention.sliding_window"):
        raise InputError(f"{path}: is an OLMo-3 with windows of attention, which is not supported; give an OLMo-2")
    return _llama(header, config, path)


def _smollm3(header: Header, config: Settings, path: Path) -> Settings:
    """No file says in which blocks nothing rotates; llama.cpp takes every fourth, as in the published models."""
    return _llama(header, config, path) | {"no_rope_layer_interval": 4}


def _granite(header: Header, config: Settings, path: Path) -> Settings:
    """The converter leaves out factors of 0, which stand for none."""
    factors = {
        "embedding_multiplier": header.get("embedding_scale", 1.0),
        "attention_multiplier": header.get("attention.scale", _head_dim(header, config) ** -0.5),
        "residual_multiplier": header.get("residual_scale", 1.0),
        "logits_scaling": header.get("logit_scale", 1.0),
    }
    return _llama(header, config, path) | factors


def _head_dim(header: Header, config: Settings) -> int:
    return header.get("attention.key_length") or _even_width(config)


def _even_width(config: Settings) -> int:
    return config["hidden_size"] // config["num_attention_heads"]


@dataclass(frozen=True)
class Architecture:
    """What is known of an architecture of llama.cpp.

    Attributes:
        model_type, model_class: of transformers.
        settings: the part of the configuration that not all architectures share; from header, the shared part and the
            path for messages.
        interleaved: whether the rows of Q and K are stored in llama.cpp's order, in which channels 2i and 2i + 1 of a
            head rotate together; transformers rotates i and i + head_dim / 2.
        norm_offset: how much larger norms are in the file than in transformers, whose Gemma adds 1 as it computes.
        by_transformers: whether transformers reads such files as well.
    """

    model_type: str
    model_class: str
    settings: Callable[[Header, Settings, Path], Settings]
    interleaved: bool = False
    norm_offset: float = 0.0
    by_transformers: bool = True


# Mistral's files call themselves llama: within its window that is the same function.
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _llama, interleaved=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _qwen2),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _llama),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _gemma2, norm_offset=1.0),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", _gemma3, norm_offset=1.0),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", _phi3),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", _olmo2, by_transformers=False),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", _smollm3, interleaved=True, by_transformers=False),
    "granite": Architecture("granite", "GraniteForCausalLM", _granite, interleaved=True, by_transformers=False),
}


def find_architecture(header: Header, where: Path) -> Architecture:
    """Return what is known of a file's architecture.

    Raises:
        InputError: nothing is, or the model is a mixture of experts.
    """
    name = header.architecture
    if name not in ARCHITECTURES:
        raise InputError(f"{where}: architecture {name} is not read from GGUF; there are {', '.join(ARCHITECTURES)}")
    if header.get("expert_count", 0):
        raise InputError(f"{where}: is a mixture of experts, which is not supported; give a dense model")
    return ARCHITECTURES[name]


def gguf_config(path: Path) -> dict[str, Any]:
    """Return what `config.json` would say.

    Raises:
        InputError: an unknown architecture, or a setting that is missing or that transformers has no place for.
    """
    header = read_header(path)
    architecture = find_architecture(header, path)
    try:
        config = _shared(header, architecture)
        return config | architecture.settings(header, config, path)
    except KeyError as error:
        raise InputError(f"{path}: its metadata lacks {error.args[0]}; fetch the file again") from error


def _shared(header: Header, architecture: Architecture) -> dict[str, Any]:
    def need(key: str) -> Any:
        return header.metadata[f"{header.architecture}.{key}"]

    heads = need("attention.head_count")
    config = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        "hidden_size": need("embedding_length"),
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": header.get("attention.head_count_kv", heads),
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        config[f"{name}_token_id"] = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
    return config
