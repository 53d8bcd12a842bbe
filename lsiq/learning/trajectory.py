"""Trajectories: what happened to each linear while a block was learned, as rows for a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lsiq.learning.learner import Epoch, Trajectory
from lsiq.models.block import Block
from lsiq.parts.base import Part, PartState
from lsiq.parts.singular import Singular

# How many singular values are kept per linear and epoch, evenly strided from the largest to the smallest.
SAMPLED_VALUES = 32


def trace(parts: Sequence[Part], learned: Trajectory, block: Block) -> list[dict[str, Any]]:
    """Return one row per linear and epoch; what became of each linear in the end is added by the block loop.

    Columns: block, linear, epoch, loss, seconds, gradient_norm and rms_change (RMS of the increment part's change of
    the weight), increment_norm, increment_max, values (sampled singular values plus increments), increments.
    """
    return [_epoch_row(parts, learned.states, epoch, block, name) for epoch in learned.epochs for name in block.linears]


def _epoch_row(
    parts: Sequence[Part], states: Sequence[PartState], epoch: Epoch, block: Block, name: str
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "block": block.index,
        "linear": name.removesuffix(".weight"),
        "epoch": epoch.index,
        "loss": epoch.loss,
        "seconds": epoch.seconds,
    }
    squares = [norm**2 for key, norm in epoch.gradients.items() if f":{name}:" in f":{key}:"]
    row["gradient_norm"] = sum(squares) ** 0.5
    for part, state in zip(parts, states, strict=True):
        increment = epoch.increments.get(f"{part.name}:{name}:increment")
        if increment is None or not isinstance(part, Singular):
            continue
        increments = {key.removeprefix(f"{part.name}:"): tensor for key, tensor in epoch.increments.items()}
        square = part.core_square(increments, name)
        if (unit := state.constants.get(f"{name}:unit")) is not None:
            increment, square = increment * unit.cpu(), square * unit.cpu() ** 2
        row["increment_norm"] = increment.norm().item()
        row["increment_max"] = increment.abs().max().item()
        values = state.constants[f"{name}:s"].cpu()[: len(increment)] + increment
        stride = max(1, len(values) // SAMPLED_VALUES)
        row["values"] = values[::stride].tolist()
        row["increments"] = increment[::stride].tolist()
        row["rms_change"] = (square / block.weights[name].numel()).clamp(min=0).sqrt().item()
    return row
