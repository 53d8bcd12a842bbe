"""Quantised queries, keys and values, through the attention registry of transformers.

The skeleton of every model attends through the function registered here. It is scaled dot-product attention as
transformers has it; while an activation format is in force it first puts queries, keys and values (after the rotary
embedding) on their grids. No layer of any model is copied or changed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lsiq.formats import ActivationFormat

NAME = "lsiq"
_IN_FORCE: ContextVar[ActivationFormat | None] = ContextVar("activation format", default=None)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention over `(batch, heads, T, head_dim)` in the signature of transformers' attention functions."""
    fmt = _IN_FORCE.get()
    if fmt is None or not (fmt.attention or fmt.softmax):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if fmt.attention:
        query, key, value = fmt.fake(query), fmt.fake(key), fmt.fake(value)
    if not fmt.softmax:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return _attend_with_quantised_softmax(query, key, value, attention_mask, kwargs.get("scaling"), fmt), None


def _attend_with_quantised_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    fmt: ActivationFormat,
) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(-1, -2)) * (scaling or 1 / math.sqrt(query.shape[-1]))
    if mask is None:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, -torch.inf)
    else:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = fmt.fake_softmax(scores.float().softmax(-1)).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


@contextlib.contextmanager
def activations(module: nn.Module, linears: tuple[str, ...], fmt: ActivationFormat | None) -> Iterator[None]:
    """While this lasts, the inputs of `linears` inside `module`, and queries, keys and values, are in `fmt`."""
    if fmt is None or not fmt.active:
        yield
        return
    last: list[tuple[Tensor, Tensor]] = []

    def quantise(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Linears of one stage read the same tensor: it is rounded once.
        if not (last and last[0][0] is args[0]):
            last[:] = [(args[0], fmt.fake(args[0]))]
        return (last[0][1], *args[1:])

    handles = [module.get_submodule(name).register_forward_pre_hook(quantise) for name in linears]
    token = _IN_FORCE.set(fmt)
    try:
        yield
    finally:
        _IN_FORCE.reset(token)
        for handle in handles:
            handle.remove()


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
