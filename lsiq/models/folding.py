"""Folding a channel scale between a producer and its consumers, so that the float function stays the same.

For channels `x` that a producer writes and linears read, `x / s` and `W diag(s)` cancel. SmoothQuant, AWQ and LET all
fold through here, while they learn and when they are done, so both are the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lsiq.models.spec import Group

if TYPE_CHECKING:
    from torch import Tensor


def fold_scale(weights: Mapping[str, Tensor], group: Group, scale: Tensor, head_dim: int) -> dict[str, Tensor]:
    """Return the tensors of a block that change when the group's channels are divided by `scale`.

    Args:
        weights: the block's tensors by dotted name.
        group: who writes and who reads the channels.
        scale: `(channels,)`, positive; the channels are what the producer writes.
        head_dim: channels per attention head.

    The producer's weight and bias are divided, each consumer's columns multiplied. Where a norm multiplies by its
    weight plus an offset, the sum is divided.
    """
    weight = weights[f"{group.producer}.weight"]
    rows = _for_all_rows(weights, group, scale, 1.0)
    if weight.dim() == 1:
        changed = {f"{group.producer}.weight": _gain(weight, group.offset, lambda gain: gain / rows)}
    else:
        changed = {f"{group.producer}.weight": weight / rows[:, None]}
    if (bias := weights.get(f"{group.producer}.bias")) is not None:
        changed[f"{group.producer}.bias"] = bias / rows
    for consumer in group.consumers:
        weight = weights[f"{consumer}.weight"]
        changed[f"{consumer}.weight"] = weight * spread(scale, weight.shape[1], head_dim)
    return changed


def fold_shift(weights: Mapping[str, Tensor], group: Group, shift: Tensor, head_dim: int) -> dict[str, Tensor]:
    """Return the tensors that change when `shift (channels,)` is subtracted from the group's channels.

    The producer's bias takes `-shift`, each consumer's bias `+ W shift`; both must have biases.
    """
    rows = _for_all_rows(weights, group, shift, 0.0)
    changed = {f"{group.producer}.bias": weights[f"{group.producer}.bias"] - rows}
    for consumer in group.consumers:
        weight = weights[f"{consumer}.weight"]
        changed[f"{consumer}.bias"] = weights[f"{consumer}.bias"] + weight @ spread(shift, weight.shape[1], head_dim)
    return changed


def fold_value_rotation(
    weights: Mapping[str, Tensor], group: Group, rotation: Tensor, head_dim: int
) -> dict[str, Tensor]:
    """Return the tensors that change when each value head's channels are rotated by `rotation (head_dim, head_dim)`.

    The producer's rows and bias take it, each head of the consumer's columns as well. One rotation serves all heads,
    so grouped-query attention needs no more care.
    """
    import torch

    part = rows_of(weights, group)
    rows = weights[f"{group.producer}.weight"]
    rotated = _by_head(rows[part].t(), rotation, head_dim).t()
    changed = {f"{group.producer}.weight": torch.cat([rows[: part.start], rotated])}
    if (bias := weights.get(f"{group.producer}.bias")) is not None:
        changed[f"{group.producer}.bias"] = torch.cat([bias[: part.start], _by_head(bias[part], rotation, head_dim)])
    for consumer in group.consumers:
        columns = weights[f"{consumer}.weight"]
        changed[f"{consumer}.weight"] = _by_head(columns, rotation, head_dim)
    return changed


def rows_of(weights: Mapping[str, Tensor], group: Group) -> slice:
    """Return which rows of the producer write the group's channels: all, or the last ones of a fused matrix.

    Beside the values of a fused matrix stand as many keys, and a query for each channel that the consumer reads.
    """
    height = weights[f"{group.producer}.weight"].shape[0]
    if not group.fused:
        return slice(0, height)
    channels = weights[f"{group.consumers[0]}.weight"].shape[1]
    return slice(height - (channels if group.kind == "linear" else (height - channels) // 2), height)


def channels_of(weights: Mapping[str, Tensor], group: Group) -> int:
    """Return how many channels the group has."""
    rows = rows_of(weights, group)
    return rows.stop - rows.start


def _for_all_rows(weights: Mapping[str, Tensor], group: Group, channels: Tensor, fill: float) -> Tensor:
    """Return `channels` for all rows of the producer, `fill` where rows write no channel of the group."""
    import torch

    before = rows_of(weights, group).start
    return torch.cat([channels.new_full((before,), fill), channels]) if before else channels


def _gain(weight: Tensor, offset: float, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the weight of a norm whose gain, the weight plus `offset`, is changed."""
    return change(weight) if offset == 0.0 else change(weight + offset) - offset


def spread(channels: Tensor, width: int, head_dim: int) -> Tensor:
    """Repeat what belongs to the producer's channels for every consumer input: `(channels,) -> (width,)`.

    Under grouped-query attention a value head serves `width / channels` query heads in a row; elsewhere both are equal.
    """
    if len(channels) == width:
        return channels
    return channels.view(-1, head_dim).repeat_interleave(width // len(channels), dim=0).flatten()


def gather(inputs: Tensor, channels: int, head_dim: int) -> Tensor:
    """The largest of what several consumer inputs say of one producer channel: `(width,) -> (channels,)`."""
    if len(inputs) == channels:
        return inputs
    return inputs.view(channels // head_dim, -1, head_dim).amax(1).flatten()


def _by_head(x: Tensor, rotation: Tensor, head_dim: int) -> Tensor:
    """Turn each run of `head_dim` of the last dimension."""
    return (x.unflatten(-1, (-1, head_dim)) @ rotation).flatten(-2)
