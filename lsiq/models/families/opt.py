"""OPT: LayerNorm, biases everywhere, ReLU, learned positions."""

from __future__ import annotations

from lsiq.models.spec import Group, ModelSpec

OPT = ModelSpec(
    model_type="opt",
    blocks="model.decoder.layers",
    stages=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
    groups=(
        Group("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "norm"),
        Group("self_attn.v_proj", ("self_attn.out_proj",), "value"),
        Group("final_layer_norm", ("fc1",), "norm"),
    ),
    # AWQ's public code folds a scale here. Measured on tiny-opt at 3 bits it did not help (excess 0.279 with, 0.268
    # without), and OmniQuant leaves it out.
    norm_subtracts_mean=True,
    homogeneous=(Group("fc1", ("fc2",), "linear"),),
)
