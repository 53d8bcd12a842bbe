"""A plan made better by what is measured around it: the model as the plan rounds it, one unit at a time otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lsiq.allocation.divergence import Assignment, changed
from lsiq.allocation.solve import Near, choose

# Divergences of trials, around the plan from which most of them differ little.
Measure = Callable[[Sequence[Assignment], Assignment], Tensor]


@dataclass(frozen=True)
class Refined:
    """A plan and how it came about.

    Attributes:
        plan: the index of the choice of each unit.
        divergences: nats per token of the whole model as planned: at the start and after each round that helped.
    """

    plan: list[int]
    divergences: list[float]


def refined(plan: list[int], bits: Sequence[Sequence[int]], budget: int, measure: Measure, rounds: int) -> Refined:
    """Return a plan within the budget whose measured divergence is no larger than that of `plan`.

    Sensitivities around float add up to too little where many units have few bits. So each round measures, around the
    plan, what each unit would change with the next smaller and the next larger choice, and solves for the best plan
    within reach: with any number of changes, and with half as many, and so on, for single changes do not add up either.
    These candidates are measured as they are, all units together, and the best one is the next plan if it is better.

    Args:
        plan: the index of the choice of each unit.
        bits: `(units, choices)`.
        measure: gives the divergence of each of some trials.
        rounds: at most so many.
    """
    divergences = [measure([plan], plan)[0].item()]
    for _ in range(rounds):
        steps = _steps(plan, bits)
        around = measure([changed(plan, *step) for step in steps], plan)
        cost = np.zeros((len(plan), len(bits[0])))
        allowed = np.zeros(cost.shape, dtype=bool)
        allowed[np.arange(len(plan)), plan] = True
        for (unit, choice), divergence in zip(steps, around.tolist(), strict=True):
            cost[unit, choice], allowed[unit, choice] = divergence - divergences[-1], True
        candidates = _candidates(plan, cost, allowed, bits, budget)
        if not candidates:
            break
        measured = measure(candidates, plan)
        best = int(measured.argmin())
        if measured[best].item() >= divergences[-1]:
            break
        plan = candidates[best]
        divergences.append(measured[best].item())
    return Refined(plan, divergences)


def _steps(plan: Sequence[int], bits: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Return each unit with the choices that are the next smaller and the next larger one than its own."""
    steps = []
    for unit, current in enumerate(plan):
        order = sorted(range(len(bits[unit])), key=lambda choice: bits[unit][choice])
        place = order.index(current)
        steps += [(unit, order[other]) for other in (place - 1, place + 1) if 0 <= other < len(order)]
    return steps


def _candidates(
    plan: list[int], cost: np.ndarray, allowed: np.ndarray, bits: Sequence[Sequence[int]], budget: int
) -> list[list[int]]:
    """Return the best plans with any number of changes and with fewer, other than `plan`, each once."""
    candidates: list[list[int]] = []
    changes = len(plan)
    while changes >= 2:  # one up and one down is the least that a full budget lets change
        candidate = choose(cost.tolist(), bits, budget, Near(plan, allowed, changes))
        if candidate != plan and candidate not in candidates:
            candidates.append(candidate)
        changes = min(changes, sum(a != b for a, b in zip(candidate, plan, strict=True))) // 2
    return candidates
