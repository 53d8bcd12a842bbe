"""OLMo-2: norms after attention and feed-forward part, before the residual sum; queries and keys normalised whole."""

from __future__ import annotations

from dataclasses import replace

from lsiq.models.families.llama import LLAMA

OLMO2 = replace(
    LLAMA,
    model_type="olmo2",
    groups=tuple(group for group in LLAMA.groups if group.kind != "norm"),
    unfoldable=(
        "its blocks have no norms in front of their linears (post-norm), and queries and keys are normalised whole; "
        "use a method that does not fold, such as rtn, gptq or duquant"
    ),
)
