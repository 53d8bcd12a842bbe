"""The choice of a format for each unit with the least sum of sensitivities under a limit of bits, found exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lsiq.errors import NumericalError


@dataclass(frozen=True)
class Near:
    """Where a choice is looked for: at most `changes` units differ from `plan`, each by a choice that is `allowed`.

    Attributes:
        plan: an index for each unit.
        allowed: `(units, choices)`, true for those of the plan.
    """

    plan: Sequence[int]
    allowed: np.ndarray
    changes: int


def choose(
    sensitivities: Sequence[Sequence[float]],
    bits: Sequence[Sequence[int]],
    budget: int,
    near: Near | None = None,
) -> list[int]:
    """Return, for each unit, the index of its choice.

        minimise  Σ_uc s_uc x_uc   where  Σ_c x_uc = 1,   Σ_uc b_uc x_uc ≤ budget,   x ∈ {0, 1}

    Args:
        sensitivities, bits: `(units, choices)`.
        budget: bits that all units may take together; the smallest choices, or those of `near`, take no more.
        near: where to look, and there for a good choice, not for the best; None for everywhere.

    Raises:
        NumericalError: a sensitivity is not finite, or the solver gives up.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix, kron

    cost, size = np.asarray(sensitivities, dtype=np.float64), np.asarray(bits, dtype=np.float64)
    if not np.isfinite(cost).all():
        raise NumericalError("a sensitivity is not finite; try model.dtype=float32 or other choices")
    units, choices = cost.shape
    one_each = kron(csr_matrix(np.eye(units)), np.ones((1, choices)))
    # Both sides in units near 1, so that the solver's tolerances, about 1e-6, are a part in a million of each.
    scale = max(np.abs(cost).max(), 1e-300)
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint((size / budget).reshape(1, -1), -np.inf, 1),
    ]
    if near is not None:
        stays = np.zeros((units, choices))
        stays[np.arange(units), near.plan] = 1
        constraints.append(LinearConstraint(stays.reshape(1, -1), units - near.changes, np.inf))
    solution = milp(
        cost.ravel() / scale,
        integrality=np.ones(units * choices),
        bounds=Bounds(0, 1 if near is None else near.allowed.astype(float).ravel()),  # type: ignore[arg-type]
        constraints=constraints,
        # Near a plan many choices cost nearly the same, and to tell them apart took gigabytes; what is found there is
        # measured anyway, so that a good one will do.
        options={"mip_rel_gap": 0.0} if near is None else {"mip_rel_gap": 1e-3, "node_limit": 1000},
    )
    if solution.x is None and near is not None:
        return list(near.plan)
    if solution.x is None:
        raise NumericalError(f"the allocation was not solved ({solution.message}); try quant.allocate.unit=stage")
    selection = solution.x.reshape(units, choices).argmax(1).tolist()
    return _within(selection, cost, size, budget)


def _within(selection: list[int], cost: np.ndarray, size: np.ndarray, budget: int) -> list[int]:
    """Return the choice, made smaller where the solver's tolerance let it exceed the limit by a few bits."""
    rows = np.arange(len(selection))
    while size[rows, selection].sum() > budget:
        best_change: tuple[float, int, int] | None = None
        for unit, current in enumerate(selection):
            for candidate in np.flatnonzero(size[unit] < size[unit, current]).tolist():
                loss = (cost[unit, candidate] - cost[unit, current]) / (size[unit, current] - size[unit, candidate])
                if best_change is None or loss < best_change[0]:
                    best_change = (loss, unit, candidate)
        assert best_change is not None, "the smallest choices fit"
        selection[best_change[1]] = best_change[2]
    return selection
