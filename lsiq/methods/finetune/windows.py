"""Which blocks are trained when, and for which of the optimizer steps."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lsiq.methods.finetune.settings import FineTune


@dataclass(frozen=True)
class Window:
    """Consecutive blocks whose weights are trained at once.

    Attributes:
        blocks: their indices.
        steps: of all steps of the group, those in which they are.
    """

    blocks: range
    steps: range


@dataclass(frozen=True)
class Group:
    """Consecutive blocks that are trained together: their grids, norms and biases in all steps.

    Attributes:
        windows: in which the increments of their weights are trained, one after another; all steps belong to one.
    """

    blocks: range
    windows: tuple[Window, ...]

    @property
    def steps(self) -> int:
        return self.windows[-1].steps.stop


def groups(settings: FineTune, depth: int, samples: int) -> list[Group]:
    """Return what is trained of a model of so many blocks, in its order.

    Windows differ by one block at most. Each has `window_epochs` epochs, and blocks that are not trained together have
    all epochs each.
    """
    first = max(0, depth - (settings.blocks or depth))
    count = depth - first
    steps = settings.weight_epochs * math.ceil(samples / settings.training.batch)
    if not settings.together:
        singles = (range(index, index + 1) for index in range(first, depth))
        return [Group(blocks, (Window(blocks, range(steps)),)) for blocks in singles]
    number = math.ceil(count / (settings.window or count)) if settings.trained == "window" else 1
    ends = [first + count * i // number for i in range(number + 1)]
    windows = (
        Window(range(start, stop), range(i * steps, (i + 1) * steps))
        for i, (start, stop) in enumerate(itertools.pairwise(ends))
    )
    return [Group(range(first, depth), tuple(windows))]
