"""Granite (dense): LLaMA's block, with fixed factors on embeddings, attention scores, residual branches and logits.

The factor of a residual branch is a number, so a rotated residual stream and folded scales pass it. The layers of
transformers apply it and that of the scores; embeddings are multiplied before the first block.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lsiq.models.families.llama import LLAMA

if TYPE_CHECKING:
    from torch import Tensor


def _scaled(logits: Tensor, config: Any) -> Tensor:
    return logits / config.logits_scaling


GRANITE = replace(LLAMA, model_type="granite", logits=_scaled)
