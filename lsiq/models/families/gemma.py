"""Gemma-2 and Gemma-3 (text): norms before and after each part, windows between full attention, capped logits.

A norm multiplies by one plus its weight. Gemma-2 also caps attention scores; Gemma-3 normalises queries and keys, and
its windows have a rotary embedding of their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lsiq.models.families.llama import LLAMA
from lsiq.models.spec import Group

if TYPE_CHECKING:
    from torch import Tensor


def _capped(logits: Tensor, config: Any) -> Tensor:
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * (logits / cap).tanh()


GEMMA2 = replace(
    LLAMA,
    model_type="gemma2",
    groups=(
        Group("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "norm", offset=1.0),
        Group("self_attn.v_proj", ("self_attn.o_proj",), "value"),
        Group("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "norm", offset=1.0),
        Group("mlp.up_proj", ("mlp.down_proj",), "linear"),
    ),
    unrotatable=(
        "its blocks also normalise, channel by channel, what they write to the residual stream (sandwich norms), which "
        "no rotation passes; leave residual out of the places"
    ),
    logits=_capped,
)
GEMMA3 = replace(GEMMA2, model_type="gemma3_text")
