"""The computation behind `lsiq.methods.lqer.settings`: which errors cost most, and the product that repairs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lsiq.calib.gram import check_finite, input_grams
from lsiq.calib.input_statistics import visit_inputs
from lsiq.errors import NumericalError
from lsiq.formats.low_rank import SideBranch, round_factors
from lsiq.models.block import Block
from lsiq.models.context import Context
from lsiq.models.result import BlockResult
from lsiq.runtime import processes
from lsiq.runtime.timing import measured_stage

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings
    from lsiq.methods.lqer.settings import LQER


def repair(
    settings: LQER, result: BlockResult, block: Block, quant: QuantSettings, context: Context
) -> tuple[dict[str, SideBranch], dict[str, float]]:
    """Return a side branch for every linear of a rounded block, and the share of the error that they leave.

    The share is the mean over linears of `‖(E - up · down) T‖² / ‖E T‖²`, factors as they are stored.
    """
    block = block.with_rotations_of(result)
    floats = {name: result.reference.get(name, block.weights[name]) for name in block.linears}
    with measured_stage("statistics"):
        costs = input_costs(settings, {**result.floats, **floats}, block, quant, context)
    fmt = settings.factor_format(quant)
    branches, error_left = {}, 0.0
    for name in block.linears:
        decoded = result.weights[name].decode().to(floats[name].device)
        error, cost = (floats[name] - decoded).double(), costs[name]
        with measured_stage("low rank"):
            up, down = project(error, cost, min(settings.rank, *error.shape))
        branches[name] = round_factors(up.float(), down.float(), fmt, name)
        kept_up, kept_down = branches[name].decode()
        remaining = error - kept_up.double() @ kept_down.double()
        if not remaining.isfinite().all():
            raise NumericalError(
                f"block {block.index}, {name}: its factors leave the range of float16; use factors=mxint8"
            )
        error_left += (_energy(remaining, cost) / max(_energy(error, cost), 1e-300)) / len(block.linears)
    return branches, {"error_left": error_left}


def input_costs(
    settings: LQER, weights: Mapping[str, Tensor], block: Block, quant: QuantSettings, context: Context
) -> dict[str, Tensor]:
    """Return `T Tᵀ` by name of a linear's weight, in float64: `(in, in)` for the covariance, else its diagonal `(in,)`.

    Args:
        weights: replace the block's own while the quantised stream runs through it.

    Sums and maxima over whole sequences: the result does not depend on how they are batched.

    Raises:
        NumericalError: an input is not finite.
    """
    heads = [linears[0] for linears in block.spec.stages]  # linears of a stage share their input
    if settings.scale == "none":
        costs = {name: block.weights[f"{name}.weight"].new_ones(1, dtype=torch.float64) for name in heads}
    else:
        assert context.inputs is not None  # the method asks for them
        if settings.scale == "covariance":
            costs = input_grams(block, weights, context.inputs, context.batch, heads, quant.running)
        else:
            costs = _diagonals(settings, weights, block, quant, context, heads)
    return {f"{name}.weight": costs[linears[0]] for linears in block.spec.stages for name in linears}


def _diagonals(
    settings: LQER,
    weights: Mapping[str, Tensor],
    block: Block,
    quant: QuantSettings,
    context: Context,
    heads: list[str],
) -> dict[str, Tensor]:
    assert context.inputs is not None
    samples, tokens = context.samples, context.inputs.shape[1]
    diagonals: dict[str, Tensor] = {}

    def update(name: str, x: Tensor) -> None:
        x = quant.activation.fake(x.float())
        if settings.scale == "magnitude":
            largest = x.abs().view(-1, tokens, x.shape[1]).mean(1, dtype=torch.float64).amax(0).square()
            diagonals[name] = largest.maximum(diagonals[name]) if name in diagonals else largest
        else:
            squares = x.square().sum(0, dtype=torch.float64) / (tokens * samples)
            diagonals[name] = squares + diagonals[name] if name in diagonals else squares

    visit_inputs(block, weights, context.inputs, context.batch, heads, update, quant.running)
    reduce = processes.largest if settings.scale == "magnitude" else processes.add
    for name, statistic in diagonals.items():
        check_finite(reduce(statistic), block, name)
    return diagonals


def project(error: Tensor, cost: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return `up (out, rank)` and `down (rank, in)` whose product leaves the least of `‖(E - up · down) T‖²`.

    Args:
        error: `E (out, in)`, float64.
        cost: `T Tᵀ (in, in)`, or its diagonal `(in,)`, or one number `(1,)`; float64.

    The product is the projection of `E` on the first left singular vectors of `E T`. Its singular values are shared
    between the factors, component by component.
    """
    basis = _left_vectors(error, cost, rank)
    down = basis.t() @ error
    share = down.norm(dim=1).sqrt().clamp(min=1e-12)
    return basis * share, down / share[:, None]


def _left_vectors(error: Tensor, cost: Tensor, rank: int) -> Tensor:
    """The first `rank` left singular vectors of `E T`, from the Gram matrix of its smaller side."""
    if error.shape[0] <= error.shape[1]:
        weighted = error @ cost if cost.dim() == 2 else error * cost
        return _first_eigenvectors(weighted @ error.t(), rank)
    cost_weighted = error @ _root(cost) if cost.dim() == 2 else error * cost.sqrt()
    return torch.linalg.qr(cost_weighted @ _first_eigenvectors(cost_weighted.t() @ cost_weighted, rank)).Q


def _first_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigh((symmetric + symmetric.t()) / 2).eigenvectors[:, -rank:].flip(1)


def _root(cost: Tensor) -> Tensor:
    """`T (in, in)` with `T Tᵀ = cost`; what rounding left below zero counts as zero, so few tokens are enough."""
    values, vectors = torch.linalg.eigh(cost)
    return vectors * values.clamp(min=0).sqrt()


def _energy(error: Tensor, cost: Tensor) -> float:
    """`‖E T‖²`."""
    weighted = error @ cost if cost.dim() == 2 else error * cost
    return (weighted * error).sum().item()
