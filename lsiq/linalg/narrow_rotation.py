"""A rotation that is trained until what it rotates spans little, so that a grid over its range is fine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RATE = 3e-3  # of Adam, falling linearly to 0; twice and half of it end within 3 % of each other (384 channels)
BATCH = 2048  # states a step


@torch.enable_grad()
def narrow_rotation(
    states: Tensor, keep_mean: bool, steps: int, generator: torch.Generator, stepped: Callable[[str], None]
) -> Tensor:
    """Return a rotation `P (d, d)` in float32 under which the states' squared ranges are small in the mean.

    A min-max grid of `b` bits over the range `r` of a state, zero included, rounds with a mean squared error of
    `r² / (12 (2^b - 1)²)`. The mean of `r²` is what is trained, on random states, from `P = I` on. `P` is the Cayley
    transform `(I + S)⁻¹ (I - S)` of a skew-symmetric matrix, so that it stays a rotation without projections.

    Source: SpinQuant (arXiv 2405.16406, section 3) trains rotations by Cayley steps, through the whole model.
    Deviation: here each state counts for itself and no gradient passes through the model, as in KurTail (arXiv
    2503.01483), which flattens the distribution (its kurtosis) where this narrows its range.

    Args:
        states: `(n, d)` in float32, of equal norm.
        keep_mean: whether the all-ones direction stays where it is, as LayerNorm needs.
        stepped: called after each step with what there is to say.
    """
    width = states.shape[1]
    free = torch.zeros(width - keep_mean, width - keep_mean, device=states.device, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=RATE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        chosen = torch.randint(len(states), (BATCH,), generator=generator).to(states.device)
        loss = squared_range(states[chosen] @ _rotation(free, keep_mean))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        stepped(f"squared range {loss.item():.4g}")
    return _rotation(free.detach().double(), keep_mean).float()


def squared_range(states: Tensor) -> Tensor:
    """Return the mean over states `(…, d)` of the square of the range of each, zero included."""
    return (states.amax(-1).clamp(min=0) - states.amin(-1).clamp(max=0)).square().mean()


def _rotation(free: Tensor, keep_mean: bool) -> Tensor:
    """The Cayley transform of what is skew-symmetric in `free`; with `keep_mean` of all channels but their mean."""
    skew = (free - free.t()) / 2
    same = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    rotation = torch.linalg.solve(same + skew, same - skew)
    if not keep_mean:
        return rotation
    width = len(skew) + 1
    # The reflection that swaps the first axis and the all-ones direction, on both sides of a rotation of the others.
    normal = skew.new_full((width,), width**-0.5)
    normal[0] -= 1
    reflection = torch.eye(width, dtype=skew.dtype, device=skew.device)
    reflection = reflection - 2 * torch.outer(normal, normal) / normal.square().sum()
    return reflection @ torch.block_diag(skew.new_ones(1, 1), rotation) @ reflection
