"""Phi-3 and Phi-4: LLaMA's block with one matrix for query, key and value, and one for gate and up.

Each fused matrix is quantised as one linear. Its last rows write the values (the up part), and take folded scales.
"""

from __future__ import annotations

from lsiq.models.spec import Group, ModelSpec

PHI3 = ModelSpec(
    model_type="phi3",
    blocks="model.layers",
    stages=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    groups=(
        Group("input_layernorm", ("self_attn.qkv_proj",), "norm"),
        Group("self_attn.qkv_proj", ("self_attn.o_proj",), "value", fused=True),
        Group("post_attention_layernorm", ("mlp.gate_up_proj",), "norm"),
        Group("mlp.gate_up_proj", ("mlp.down_proj",), "linear", fused=True),
    ),
    query="self_attn.qkv_proj",
    key="self_attn.qkv_proj",
)
