"""Which blocks are trained when, and for which of the optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lsiq.methods.finetune.settings import FineTune


@dataclass(frozen=True)
class Window:
    """Consecutive blocks that are trained at once.

    Attributes:
        number: its place among the windows, from 0.
        blocks: their indices.
        steps: of all steps that the schedule has, those in which they are trained.
        drawn: the first block of those whose batches are drawn in one order.
    """

    number: int
    blocks: range
    steps: range
    drawn: int


def windows(settings: FineTune, depth: int, samples: int) -> list[Window]:
    """Return the windows of a model of so many blocks, in the order in which they are trained.

    Windows share the steps in proportion to their blocks, and differ by one block at most. Blocks that are not trained
    together have all steps each.
    """
    first = max(0, depth - (settings.blocks or depth))
    count = depth - first
    steps = settings.training.epochs * math.ceil(samples / settings.training.batch)
    if not settings.together:
        return [Window(i, range(first + i, first + i + 1), range(steps), first + i) for i in range(count)]
    number = math.ceil(count / (settings.window or count)) if settings.trained == "window" else 1
    ends = [count * i // number for i in range(number + 1)]
    return [
        Window(i, range(first + a, first + b), range(steps * a // count, steps * b // count), first)
        for i, (a, b) in enumerate(zip(ends, ends[1:], strict=False))
    ]
