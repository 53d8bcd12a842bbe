"""Tokens that stand in the key-value cache before every sequence.

A sequence after a prefix is a window of a longer one: positions go on after the prefix, and every token attends to it.
The prefix itself is never quantised: for each block the float model's states of its tokens are kept, and the block
makes keys and values of them with the weights it has at the time, so that what is folded into values or keys holds for
the prefix too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsiq.errors import InputError
from lsiq.models.entrance import CACHE, for_kind, join_kinds, split_kinds


@dataclass(frozen=True)
class ModelPrefix:
    """A prefix of a whole model.

    Attributes:
        tokens: `(P,)` token ids.
        hidden: `(depth, P, d)` float32, what the float model feeds each block for them.
        kwargs: the keyword arguments that the model passes to every block for the prefix alone.
    """

    tokens: Tensor
    hidden: Tensor
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class BlockPrefix:
    """A prefix as one block meets it: `hidden (1, P, d)` on the block's device, and the keyword arguments for it."""

    hidden: Tensor
    kwargs: Mapping[str, Any]


class KeysReached(Exception):  # noqa: N818 (not an error: it ends a forward pass early)
    """Carries keys and values, `(1, heads, P, head_dim)` each, out of a layer before it attends."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values


class Recorder:
    """In place of a cache of transformers: ends the layer's forward pass with its keys and values."""

    def update(self, keys: Tensor, values: Tensor, layer: int, **of_the_layer: Any) -> tuple[Tensor, Tensor]:
        del layer, of_the_layer
        raise KeysReached(keys, values)


@dataclass(frozen=True)
class PrefixCache:
    """In place of a cache of transformers: puts the same keys and values in front of every sequence's own."""

    keys: Tensor
    values: Tensor

    def begin(self, kwargs: Mapping[str, Any], batch: int, layer: int) -> Mapping[str, Any]:
        """Return a block's keyword arguments with this cache, or with their own, which the prefix then begins."""
        cache = kwargs.get(CACHE)
        if cache is None:
            return {**kwargs, CACHE: self}
        if not cache.get_seq_length(layer):
            cache.update(*(part.expand(batch, -1, -1, -1) for part in (self.keys, self.values)), layer)
        return kwargs

    def update(self, keys: Tensor, values: Tensor, layer: int, **of_the_layer: Any) -> tuple[Tensor, Tensor]:
        del layer, of_the_layer
        batch = keys.shape[0]
        return (
            torch.cat([self.keys.expand(batch, -1, -1, -1), keys], 2),
            torch.cat([self.values.expand(batch, -1, -1, -1), values], 2),
        )


def after_prefix(kwargs: Mapping[str, Any], prefix: ModelPrefix) -> dict[str, Any]:
    """Return the blocks' keyword arguments for what follows the prefix, which is in the cache.

    Args:
        kwargs: as the model gives them for prefix and sequence together.

    Raises:
        InputError: the rotary embedding of the prefix is not what it is alone.
    """
    count = len(prefix.tokens)
    return join_kinds(
        {kind: _after(of_kind, for_kind(prefix.kwargs, kind), count) for kind, of_kind in split_kinds(kwargs).items()}
    )


def _after(kwargs: Mapping[str, Any], alone: Mapping[str, Any], prefix: int) -> dict[str, Any]:
    positions = kwargs["position_ids"].shape[1]
    changed = dict(kwargs)
    changed["position_ids"] = kwargs["position_ids"][:, prefix:]
    if "position_embeddings" in kwargs:
        pairs = zip(kwargs["position_embeddings"], alone["position_embeddings"], strict=True)
        if not all(torch.equal(part[:1, :prefix], expected) for part, expected in pairs):
            raise InputError(
                f"the rotary embedding of a prefix of {prefix} tokens changes with {positions} tokens (LongRoPE), "
                "so its keys cannot be kept; use shorter sequences (calib.seqlen, eval.seqlen) or no prefix"
            )
        changed["position_embeddings"] = tuple(part[:, prefix:] for part in kwargs["position_embeddings"])
    mask = kwargs["attention_mask"]
    if mask is None:  # plain causal attention, which has no short form where there are more keys than queries
        device = kwargs["position_ids"].device
        mask = torch.ones(1, 1, positions, positions, dtype=torch.bool, device=device).tril()
    changed["attention_mask"] = mask[..., prefix:, :]
    return changed
