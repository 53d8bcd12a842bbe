"""Quantised queries, keys and values, through the attention registry of transformers.

The skeleton of every model attends through the function registered here. It is scaled dot-product attention as
transformers has it; while an activation format is in force it first puts queries, keys and values (after the rotary
embedding) on their grids, rotated beforehand where that was asked for. No layer of any model is copied or changed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lsiq.formats.base import ActivationFormat
from lsiq.formats.key_value import KeyValue, Running, cache_of
from lsiq.linalg.rotation import QUERY_KEY, Rotation

NAME = "lsiq"


@dataclass(frozen=True)
class _Force:
    format: ActivationFormat | None
    query_key: Rotation | None
    prefix: int


_IN_FORCE: ContextVar[_Force | None] = ContextVar("what happens to queries, keys and values", default=None)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention over `(batch, heads, T, head_dim)` in the signature of transformers' attention functions.

    Keys and values of a prefix, the first in the cache, stay in float.
    """
    force = _IN_FORCE.get()
    if force is not None and force.query_key is not None:
        query, key = force.query_key.apply(query), force.query_key.apply(key)
    fmt = None if force is None else force.format
    scaling, cap = kwargs.get("scaling"), kwargs.get("softcap")
    if force is not None and fmt is not None:
        cache = cache_of(fmt)
        if fmt.attention:
            query = fmt.fake(query)
        if cache is not None and cache.rounds and cache.per == "channel":
            softmax = fmt if fmt.softmax else None
            outputs = _attend_to_groups(query, key, value, attention_mask, scaling, cap, softmax, cache, force.prefix)
            return outputs, None
        if isinstance(fmt, Running):
            key, value = (
                _fake_after(force.prefix, key, fmt.fake_keys),
                _fake_after(force.prefix, value, fmt.fake_values),
            )
        elif fmt.attention:
            key, value = _fake_after(force.prefix, key, fmt.fake), _fake_after(force.prefix, value, fmt.fake)
    if fmt is not None and fmt.softmax:
        return _attend_step_by_step(query, key, value, attention_mask, scaling, cap, fmt), None
    if cap is not None:
        return _attend_step_by_step(query, key, value, attention_mask, scaling, cap, None), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _fake_after(prefix: int, x: Tensor, fake: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([x[:, :, :prefix], fake(x[:, :, prefix:])], 2) if prefix else fake(x)


def _attend_to_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    cap: float | None,
    softmax: ActivationFormat | None,
    cache: KeyValue,
    prefix: int,
) -> Tensor:
    """Attention to a cache whose tokens are rounded by the group, each once the last of its group is there.

    A query sees rounded keys and values of all groups that end with its own token or before, and those of the newest
    tokens in float. (In a pass over a whole sequence each query thus attends to the cache as it would have been.)
    """
    assert cache.group is not None
    repeats = query.shape[1] // key.shape[1]
    count, device = key.shape[2], key.device
    at = torch.arange(count - query.shape[2], count, device=device)[:, None]
    place = torch.arange(count, device=device)[None]
    complete = prefix + ((place - prefix) // cache.group + 1) * cache.group - 1
    rounded = (place >= prefix) & (complete <= at)
    pairs = [(x, _fake_after(prefix, x, cache.fake)) for x in (key, value)]
    (key, near), (value, far) = ([part.repeat_interleave(repeats, 1) for part in pair] for pair in pairs)
    scale = scaling or 1 / math.sqrt(query.shape[-1])
    scores = torch.where(rounded, query @ near.transpose(-1, -2), query @ key.transpose(-1, -2)) * scale
    weights = _weights_of(scores, mask, cap, softmax, value.dtype)
    outputs = (weights * rounded) @ far + (weights * ~rounded) @ value
    return outputs.transpose(1, 2).contiguous()


def _attend_step_by_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    cap: float | None,
    fmt: ActivationFormat | None,
) -> Tensor:
    """Attention whose scores are capped to `cap · tanh(scores / cap)`, or whose softmax is put into a format.

    Scaled dot-product attention as torch has it can do neither.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(-1, -2)) * (scaling or 1 / math.sqrt(query.shape[-1]))
    weights = _weights_of(scores, mask, cap, fmt, value.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


def _weights_of(
    scores: Tensor, mask: Tensor | None, cap: float | None, fmt: ActivationFormat | None, dtype: torch.dtype
) -> Tensor:
    """Return the attention weights of `scores (batch, heads, queries, keys)`."""
    if cap is not None:
        scores = (scores / cap).tanh() * cap
    if mask is None:  # plain causal attention; keys that came before the first query are in a cache
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        mask = allowed.tril(scores.shape[-1] - scores.shape[-2])
    # The least number, not infinity: a padded token attends to nothing, and must not become NaN.
    least = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    weights = scores.float().softmax(-1)
    return (weights if fmt is None else fmt.fake_softmax(weights)).to(dtype)


@contextlib.contextmanager
def activations(
    module: nn.Module,
    linears: tuple[str, ...],
    fmt: ActivationFormat | None,
    rotations: Mapping[str, Rotation] | None = None,
    prefix: int = 0,
) -> Iterator[None]:
    """While this lasts, the inputs of `linears` in `module`, and queries, keys and values, are rotated and in `fmt`.

    Args:
        rotations: by name of the linear whose input is rotated, or `query_key`; rotated first, then rounded.
        prefix: how many keys and values, the first, are not put into the format.
    """
    rotations = rotations or {}
    active = fmt if fmt is not None and fmt.active else None
    if active is None and not rotations:
        yield
        return
    last: list[tuple[Tensor, Tensor]] = []

    def prepare(rotation: Rotation | None) -> Callable[..., tuple[Tensor, ...]]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # Linears of one stage read the same tensor: it is rotated and rounded once.
            if not (last and last[0][0] is args[0]):
                rotated = args[0] if rotation is None else rotation.apply(args[0])
                last[:] = [(args[0], rotated if active is None else active.fake(rotated))]
            return (last[0][1], *args[1:])

        return hook

    handles = [
        module.get_submodule(name).register_forward_pre_hook(prepare(rotations.get(name)))
        for name in linears
        if active is not None or name in rotations
    ]
    token = _IN_FORCE.set(_Force(active, rotations.get(QUERY_KEY), prefix))
    try:
        yield
    finally:
        _IN_FORCE.reset(token)
        for handle in handles:
            handle.remove()


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
