"""The choice of a format for each unit with the least sum of sensitivities under a limit of bits, found exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lsiq.errors import NumericalError


def choose(sensitivities: Sequence[Sequence[float]], bits: Sequence[Sequence[int]], allowed: int) -> list[int]:
    """Return, for each unit, the index of its choice.

        minimise  Σ_uc s_uc x_uc   where  Σ_c x_uc = 1,   Σ_uc b_uc x_uc ≤ allowed,   x ∈ {0, 1}

    Args:
        sensitivities, bits: `(units, choices)`.
        allowed: bits that all units may take together; the smallest choices take no more.

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
    scale = max(cost.max(), 1e-300)
    found = milp(
        cost.ravel() / scale,
        integrality=np.ones(units * choices),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint((size / allowed).reshape(1, -1), -np.inf, 1),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise NumericalError(f"the allocation was not solved ({found.message}); try quant.allocate.unit=stage")
    picked = found.x.reshape(units, choices).argmax(1).tolist()
    return _within(picked, cost, size, allowed)


def _within(picked: list[int], cost: np.ndarray, size: np.ndarray, allowed: int) -> list[int]:
    """Return the choice, made smaller where the solver's tolerance let it exceed the limit by a few bits."""
    rows = np.arange(len(picked))
    while size[rows, picked].sum() > allowed:
        best: tuple[float, int, int] | None = None
        for unit, now in enumerate(picked):
            for other in np.flatnonzero(size[unit] < size[unit, now]).tolist():
                loss = (cost[unit, other] - cost[unit, now]) / (size[unit, now] - size[unit, other])
                if best is None or loss < best[0]:
                    best = (loss, unit, other)
        assert best is not None, "the smallest choices fit"
        picked[best[1]] = best[2]
    return picked
