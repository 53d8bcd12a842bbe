"""Tiny shapes of every family beside LLaMA and OPT, each with what is particular to it."""

from __future__ import annotations

from typing import Any

_TINY: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The first half of LongRoPE's lists serves up to `original_max_position_embeddings`, tests go beyond.
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 16}
_FACTORS = {"embedding_multiplier": 6.0, "attention_multiplier": 0.1, "residual_multiplier": 0.3, "logits_scaling": 4.0}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama-3.2": _TINY | {"model_type": "llama", "rope_parameters": _LLAMA3, "head_dim": 32},
    "smollm2": _TINY | {"model_type": "llama", "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 96},
    "llama-biases": _TINY | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "smollm3": _TINY | {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "olmo2": _TINY | {"model_type": "olmo2", "tie_word_embeddings": False},
    "phi3": _TINY | {"model_type": "phi3", "sliding_window": 20, "tie_word_embeddings": False},
    "phi4-mini": _TINY | {"model_type": "phi3", "rope_parameters": _LONG, "original_max_position_embeddings": 32},
    "gemma2": _TINY | _GEMMA | {"model_type": "gemma2", "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3": _TINY
    | _GEMMA
    | {"model_type": "gemma3_text", "num_hidden_layers": 3, "sliding_window_pattern": 3, "num_key_value_heads": 1},
    "granite": _TINY | {"model_type": "granite"} | _FACTORS,
    "qwen3": _TINY | {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": False},
    "qwen3-windows": _TINY
    | {
        "model_type": "qwen3",
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
}
