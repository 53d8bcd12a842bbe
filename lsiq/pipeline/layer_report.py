"""What became of each linear of a block, whatever the method: output errors, flipped codes, histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lsiq.calib.input_statistics import visit_inputs
from lsiq.formats.tensor import QuantizedTensor, quantize
from lsiq.models.block import Block
from lsiq.models.result import BlockResult, result_weights

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings


K = TypeVar("K")
BINS = 64
# Tokens on which outputs are compared: ratios of sums over all channels, so that more would not move them much.
TOKENS = 512


def first_tokens(stream: Tensor | None) -> Tensor | None:
    """Return the first sequences of a stream `(N, T, d)`, on which outputs are compared; None without one."""
    return None if stream is None else stream[: max(1, TOKENS // stream.shape[1])]


@torch.no_grad()
def layer_rows(block: Block, result: BlockResult, quant: QuantSettings, inputs: Tensor | None) -> list[dict[str, Any]]:
    """Return one row per linear, comparing what a method made of it with what rounding to nearest makes of it.

    Columns: block, linear, epoch (-1: after all epochs); error_before and error_after, the mean square of what rounding
    adds to the linear's output over that of the output itself, with the weights rounded to nearest and with the
    result's; flip_rate, the share of codes that differ from those to which the weights they stand for are rounded to
    nearest; histogram_before and histogram_after of the weights in 64 bins from -histogram_range to histogram_range,
    histogram_codes_before and histogram_codes.

    Every linear is looked at alone, behind float linears and without activation formats. Errors are NaN without
    calibration data, and errors after and flips where the result does not say which float weights its codes stand for.

    Args:
        inputs: `(N, T, d)`, some of what the quantised model feeds the block.
    """
    plain = {name: quantize(block.weights[name], quant.of(name), name) for name in block.linears}
    result = replace(result, weights={name: w.to(plain[name].codes.device) for name, w in result.weights.items()})
    stored = result_weights(result, block.weights)
    comparable = bool(result.reference) or not (result.floats or result.rotations)
    before, after = _errors(block, result, plain, stored, comparable, inputs)
    rows: list[dict[str, Any]] = []
    for name in block.linears:
        codes, old = result.weights[name].codes, block.weights[name]
        nearest = plain[name].codes
        if name in result.reference:
            nearest = quantize(result.reference[name].to(old.device), quant.of(name), name).codes
        reach = max(old.abs().max().item(), stored[name].abs().max().item(), 1e-12)
        rows.append(
            {
                "block": block.index,
                "linear": name.removesuffix(".weight"),
                "epoch": -1,
                "error_before": before[name],
                "error_after": after[name],
                "flip_rate": (nearest != codes).float().mean().item() if comparable else float("nan"),
                "histogram_before": _histogram(old, reach),
                "histogram_after": _histogram(stored[name], reach),
                "histogram_codes_before": _counts(plain[name]),
                "histogram_codes": _counts(result.weights[name]),
                "histogram_range": reach,
            }
        )
    return rows


def _errors(
    block: Block,
    result: BlockResult,
    plain: Mapping[str, QuantizedTensor],
    stored: Mapping[str, Tensor],
    comparable: bool,
    inputs: Tensor | None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the output errors of the weights rounded to nearest and of the result's, by linear."""
    before = after = dict.fromkeys(block.linears, float("nan"))
    if inputs is None:
        return before, after
    rounded = {name: weight.decode() for name, weight in plain.items()}
    beside = _products(block, result)
    repaired = {name: stored[name] + beside[name] if name in beside else stored[name] for name in block.linears}
    if comparable and not result.reference:  # both stand for the same weights, so one pass serves both
        before, after = _output_errors(block, block.weights, [rounded, repaired], inputs)
        return before, after
    (before,) = _output_errors(block, block.weights, [rounded], inputs)
    if comparable:
        reference = {**block.weights, **_on(block, result.floats), **_on(block, result.reference)}
        (after,) = _output_errors(block.with_rotations_of(result), reference, [repaired], inputs)
    return before, after


def _output_errors(
    block: Block, weights: Mapping[str, Tensor], candidates: Sequence[Mapping[str, Tensor]], inputs: Tensor
) -> list[dict[str, float]]:
    """Return, by linear, the mean square that each of `candidates` adds to its output, over that of the output."""
    stages = {stage[0]: stage for stage in block.spec.stages}
    errors: list[dict[str, float]] = [dict.fromkeys(block.linears, 0.0) for _ in candidates]
    power = dict.fromkeys(block.linears, 0.0)

    def update(first: str, x: Tensor) -> None:
        x = x.float()
        for name in (name for linear in stages[first] if (name := f"{linear}.weight") in power):
            w = weights[name].float()
            power[name] += (x @ w.T).square().sum().item()
            for sums, candidate in zip(errors, candidates, strict=True):
                sums[name] += (x @ (candidate[name].float() - w).T).square().sum().item()

    visit_inputs(block, weights, inputs, 1, list(stages), update)
    return [{name: total / max(power[name], 1e-30) for name, total in sums.items()} for sums in errors]


def _on(block: Block, tensors: Mapping[K, Tensor]) -> dict[K, Tensor]:
    device = block.device
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _products(block: Block, result: BlockResult) -> dict[str, Tensor]:
    """The low-rank products that run beside linears, as weights."""
    decoded = {name: _on(block, dict(enumerate(branch.decode()))) for name, branch in result.branches.items()}
    return {name: factors[0].float() @ factors[1].float() for name, factors in decoded.items()}


def _counts(weight: QuantizedTensor) -> list[int]:
    return torch.bincount(weight.codes.flatten().int(), minlength=weight.format.levels + 1).tolist()


def _histogram(w: Tensor, reach: float) -> list[float]:
    return torch.histc(w.float(), bins=BINS, min=-reach, max=reach).tolist()
