"""What became of each linear of a block, whatever the method: output errors, flipped codes, histograms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsiq.calib.statistics import visit_inputs
from lsiq.formats.tensor import quantize
from lsiq.methods.base import BlockResult
from lsiq.models.block import Block, result_weights

if TYPE_CHECKING:
    from lsiq.config import QuantSettings

BINS = 64


@torch.no_grad()
def layer_rows(
    block: Block, result: BlockResult, quant: QuantSettings, inputs: Tensor | None, batch: int
) -> list[dict[str, Any]]:
    """Return one row per linear, comparing what a method made of it with what rounding to nearest makes of it.

    Columns: block, linear, epoch (-1: after all epochs); error_before and error_after, the mean square of what rounding
    adds to the linear's output over that of the output itself, with the weights rounded to nearest and with the
    result's; flip_rate, the share of codes that differ from those to which the weights they stand for are rounded to
    nearest; histogram_before and histogram_after of the weights in 64 bins from -histogram_range to histogram_range,
    histogram_codes_before and histogram_codes.

    Every linear is looked at alone, behind float linears and without activation formats. Errors are NaN without
    calibration data, and errors after and flips where the result does not say which float weights its codes stand for.

    Args:
        inputs: `(N, T, d)` that the quantised model feeds the block.
    """
    plain = {name: quantize(block.weights[name], quant.weight, name) for name in block.linears}
    known = bool(result.reference) or not (result.floats or result.rotations)
    reference = {**block.weights, **_on(block, result.floats), **_on(block, result.reference)}
    stored = result_weights(result, block.weights)
    nan = dict.fromkeys(block.linears, float("nan"))
    before, after = nan, nan
    if inputs is not None:
        rounded = {name: weight.decode() for name, weight in plain.items()}
        before = _output_errors(block, block.weights, rounded, inputs, batch)
        if known:
            branches = {name: up @ down for name, (up, down) in _factors(block, result).items()}
            repaired = {name: stored[name] + branches[name] if name in branches else stored[name] for name in plain}
            after = _output_errors(block.turning(result), reference, repaired, inputs, batch)
    rows: list[dict[str, Any]] = []
    for name in block.linears:
        codes, old = result.weights[name].codes.to(plain[name].codes.device), block.weights[name]
        nearest = quantize(reference[name], quant.weight, name).codes if result.reference else plain[name].codes
        reach = max(old.abs().max().item(), stored[name].abs().max().item(), 1e-12)
        rows.append(
            {
                "block": block.index,
                "linear": name.removesuffix(".weight"),
                "epoch": -1,
                "error_before": before[name],
                "error_after": after[name],
                "flip_rate": (nearest != codes).float().mean().item() if known else float("nan"),
                "histogram_before": _histogram(old, reach),
                "histogram_after": _histogram(stored[name], reach),
                "histogram_codes_before": _counts(plain[name].codes, quant),
                "histogram_codes": _counts(codes, quant),
                "histogram_range": reach,
            }
        )
    return rows


def _output_errors(
    block: Block, weights: Mapping[str, Tensor], rounded: Mapping[str, Tensor], inputs: Tensor, batch: int
) -> dict[str, float]:
    """Return, by linear, the mean square that `rounded` adds to its output, over that of the output with `weights`."""
    stages = {stage[0]: stage for stage in block.spec.stages}
    added, power = dict.fromkeys(rounded, 0.0), dict.fromkeys(rounded, 0.0)

    def update(first: str, x: Tensor) -> None:
        for linear in stages[first]:
            name = f"{linear}.weight"
            w = weights[name].float()
            added[name] += (x @ (rounded[name].float() - w).T).square().sum().item()
            power[name] += (x @ w.T).square().sum().item()

    visit_inputs(block, weights, inputs, batch, list(stages), update)
    return {name: added[name] / max(power[name], 1e-30) for name in rounded}


def _on(block: Block, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = next(iter(block.weights.values())).device
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _factors(block: Block, result: BlockResult) -> dict[str, tuple[Tensor, Tensor]]:
    device = next(iter(block.weights.values())).device
    decoded = {name: branch.decode() for name, branch in result.branches.items()}
    return {name: (up.to(device).float(), down.to(device).float()) for name, (up, down) in decoded.items()}


def _counts(codes: Tensor, quant: QuantSettings) -> list[int]:
    return torch.bincount(codes.flatten().int(), minlength=quant.weight.levels + 1).tolist()


def _histogram(w: Tensor, reach: float) -> list[float]:
    return torch.histc(w.float(), bins=BINS, min=-reach, max=reach).tolist()
