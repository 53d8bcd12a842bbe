"""The second-order estimate of the same divergence: all choices of all linears from one backward pass a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lsiq.allocation.units import Unit
from lsiq.formats.base import WeightFormat
from lsiq.formats.tensor import quantize
from lsiq.models.block import Block
from lsiq.models.loading import Model


def estimated_divergences(
    model: Model,
    tokens: Tensor,
    units: Sequence[Unit],
    choices: Sequence[WeightFormat],
    generator: torch.Generator,
    advance: Callable[[], None],
) -> Tensor:
    """Return the estimated divergence `(units, choices)`, float64, nats per predicted token.

    With `δ` the rounding error of a unit's weights and `y` drawn from what the float model predicts,

        KL ≈ ½ δᵀ F δ = ½ E_y (Σ ∂ log p(y) / ∂W · δ)²

    the mean over sequences of the squared product, for predictions of different positions are drawn independently.
    With `n` sequences its relative standard error is about `√(2/n)`.

    Args:
        tokens: `(N, T)`.
        advance: called after each block.

    Source: the Fisher information as the Hessian of the divergence at zero, with labels of the model's own (Martens,
    arXiv 1412.1193, section 6).
    """
    sequences = [tokens[i : i + 1] for i in range(len(tokens))]
    entering, kwargs = _entering(model, sequences)
    gradients = [_gradient_behind(model, hidden, generator) for hidden in entering[-1]]
    estimates = torch.zeros(len(units), len(choices), dtype=torch.float64)
    rows = {index: [row for row, unit in enumerate(units) if unit.block == index] for index in range(model.depth)}
    for index in reversed(range(model.depth)):
        block = model.block(index, kwargs)
        errors = _errors(block, [units[row] for row in rows[index]], choices)
        for number, hidden in enumerate(entering[index]):
            slopes, gradients[number] = _back(block, hidden, gradients[number])
            for row in rows[index]:
                for column in range(len(choices)):
                    product = sum(
                        (slopes[name] * errors[name][column]).sum(dtype=torch.float64).item()
                        for name in (f"{linear}.weight" for linear in units[row].linears)
                    )
                    estimates[row, column] += 0.5 * product**2 / (len(tokens) * (tokens.shape[1] - 1))
        advance()
    return estimates


@torch.no_grad()
def _entering(model: Model, sequences: Sequence[Tensor]) -> tuple[list[list[Tensor]], dict]:
    """Return what enters each block, and last what leaves the last one, by sequence."""
    embedded = [model.embed(sequence, 1) for sequence in sequences]
    kwargs = embedded[0][1]
    streams = [[hidden.to(model.device) for hidden, _ in embedded]]
    for index in range(model.depth):
        function = model.block(index, kwargs).with_weights({})
        streams.append([function(hidden) for hidden in streams[-1]])
    return streams, kwargs


def _gradient_behind(model: Model, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradient of the log likelihood of drawn labels by what left the last block, `(1, T, d)`."""
    hidden = hidden.detach().requires_grad_()
    predicted = model.logits(hidden)[0, :-1].log_softmax(-1)
    labels = torch.multinomial(predicted.detach().exp().cpu(), 1, generator=generator).to(predicted.device)
    (gradient,) = torch.autograd.grad(predicted.gather(1, labels).sum(), hidden)
    return gradient


def _errors(block: Block, units: Sequence[Unit], choices: Sequence[WeightFormat]) -> dict[str, list[Tensor]]:
    """Return what rounding to nearest adds to each linear's weight, by choice."""
    names = [f"{linear}.weight" for unit in units for linear in unit.linears]
    errors: dict[str, list[Tensor]] = {}
    for name in names:
        w = block.weights[name]
        errors[name] = [
            torch.zeros_like(w) if fmt.bits == 16 else quantize(w, fmt, name).decode() - w for fmt in choices
        ]
    return errors


def _back(block: Block, hidden: Tensor, gradient: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the gradients of the block's linears, by name, and of what entered it."""
    hidden = hidden.detach().requires_grad_()
    weights = {name: block.weights[name].detach().requires_grad_() for name in block.linears}
    with torch.enable_grad():
        out = block.with_weights(weights)(hidden)
        gradients = torch.autograd.grad(out, [hidden, *weights.values()], gradient)
    return dict(zip(weights, gradients[1:], strict=True)), gradients[0]
