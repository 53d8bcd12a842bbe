"""Trajectories: what happened to each linear while a block was learned, as rows for a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsiq.formats.tensor import quantize
from lsiq.learn import Epoch, Learned
from lsiq.methods.base import BlockResult
from lsiq.models.block import Block
from lsiq.parts.base import Part, PartState
from lsiq.parts.singular import Singular
from lsiq.step import apply_parts

if TYPE_CHECKING:
    from lsiq.config import QuantSettings

# How many singular values are kept per linear and epoch, evenly strided from the largest to the smallest.
SAMPLED_VALUES = 32
BINS = 64


def trace(
    parts: Sequence[Part], learned: Learned, block: Block, quant: QuantSettings, result: BlockResult
) -> list[dict[str, Any]]:
    """Return one row per linear and epoch, and one last row per linear with the histograms.

    Columns: block, linear, epoch (the last row has -1), loss, gradient_norm and rms_change (RMS of the increment part's
    change of the weight), increment_norm, increment_max, values (sampled singular values plus increments), flip_rate
    (share of codes that differ from round-to-nearest's), histogram_before, histogram_after, histogram_codes,
    histogram_range (the weights' edges).
    """
    rows: list[dict[str, Any]] = []
    for epoch in learned.epochs:
        rows += [_epoch_row(parts, learned.states, epoch, block, name) for name in block.linears]
    draft = apply_parts(parts, learned.states, block)
    for name in block.linears:
        before, after = block.weights[name], result.weights[name].decode()
        plain = quantize(before, quant.weight, name)
        reach = max(before.abs().max().item(), after.abs().max().item(), 1e-12)
        rows.append(
            {
                "block": block.index,
                "linear": name.removesuffix(".weight"),
                "epoch": -1,
                "flip_rate": (plain.codes != result.weights[name].codes).float().mean().item(),
                "rms_change": (draft.weights[name] - before).square().mean().sqrt().item(),
                "histogram_before": _histogram(before, reach),
                "histogram_after": _histogram(after, reach),
                "histogram_codes": torch.bincount(
                    result.weights[name].codes.flatten().int(), minlength=quant.weight.levels + 1
                ).tolist(),
                "histogram_range": reach,
            }
        )
    return rows


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
        row["increment_norm"] = increment.norm().item()
        row["increment_max"] = increment.abs().max().item()
        values = state.constants[f"{name}:s"].cpu()[: len(increment)] + increment
        stride = max(1, len(values) // SAMPLED_VALUES)
        row["values"] = values[::stride].tolist()
        row["increments"] = increment[::stride].tolist()
        own = {key.removeprefix(f"{part.name}:"): tensor for key, tensor in epoch.increments.items()}
        row["rms_change"] = (part.core_square(own, name) / block.weights[name].numel()).clamp(min=0).sqrt().item()
    return row


def _histogram(w: Tensor, reach: float) -> list[float]:
    return torch.histc(w.float(), bins=BINS, min=-reach, max=reach).tolist()
