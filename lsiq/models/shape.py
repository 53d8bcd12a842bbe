"""Counts of a model that costs go by, told from its configuration alone. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Counts of a model that costs go by.

    Attributes:
        weights: of the linears of one block.
        width, inner: channels of the residual stream and inside the MLP.
    """

    weights: int
    width: int
    inner: int
    vocabulary: int
    outside: int

    @classmethod
    def of(cls, architecture: Mapping[str, Any]) -> Shape:
        """Count a transformers configuration of a supported family."""
        opt = architecture["model_type"] == "opt"
        width, heads = int(architecture["hidden_size"]), int(architecture["num_attention_heads"])
        inner = int(architecture["ffn_dim" if opt else "intermediate_size"])
        head = int(architecture.get("head_dim") or width // heads)
        values = int(architecture.get("num_key_value_heads") or heads) * head
        weights = 2 * width * heads * head + 2 * width * values + (2 if opt else 3) * width * inner
        vocabulary = int(architecture["vocab_size"])
        tied = bool(architecture.get("tie_word_embeddings", opt))
        positions = int(architecture.get("max_position_embeddings", 0)) * width if opt else 0
        return cls(weights, width, inner, vocabulary, (1 if tied else 2) * vocabulary * width + positions)

    @classmethod
    def of_config(cls, model_type: str, config: Any) -> Shape:
        """Count the configuration object of a model of a family."""
        return cls.of({"model_type": model_type, **config.to_dict()})

    def operations(self, tokens: int) -> float:
        """Floating-point operations of one sequence through a block."""
        return tokens * (2 * self.weights + 4 * tokens * self.width)

    def head_operations(self, tokens: int) -> float:
        return 2 * tokens * self.width * self.vocabulary

    def activations(self, tokens: int) -> int:
        """Numbers that one sequence leaves behind in a block, if all are kept."""
        return tokens * (8 * self.width + 3 * self.inner)  # attention scores are not kept
