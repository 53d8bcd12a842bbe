"""LLaMA, and the families that share its block: Mistral, Qwen2(.5), Qwen3 dense and SmolLM3.

Qwen3 normalises queries and keys head by head after their projections. SmolLM3 leaves the rotary embedding out of every
fourth block; the layers of transformers know which.
"""

from __future__ import annotations

from dataclasses import replace

from lsiq.models.spec import Group, ModelSpec

LLAMA = ModelSpec(
    model_type="llama",
    blocks="model.layers",
    stages=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    groups=(
        Group("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "norm"),
        Group("self_attn.v_proj", ("self_attn.o_proj",), "value"),
        Group("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "norm"),
        Group("mlp.up_proj", ("mlp.down_proj",), "linear"),
    ),
)
MISTRAL = replace(LLAMA, model_type="mistral")
QWEN2 = replace(LLAMA, model_type="qwen2")
QWEN3 = replace(LLAMA, model_type="qwen3")
SMOLLM3 = replace(LLAMA, model_type="smollm3")
