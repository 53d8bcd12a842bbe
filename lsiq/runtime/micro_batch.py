"""How many sequences pass at once: as many as are asked for, or as many as the device has room for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from lsiq.errors import ResourceError
from lsiq.runtime import processes
from lsiq.runtime.terminal import warn

T = TypeVar("T")
AGAIN = "finished blocks are kept: the same command goes on with them on a device with more memory"


class MicroBatch:
    """A number of sequences that is halved each time the device runs out of memory, and stays so.

    Attributes:
        size: how many pass at once.
    """

    def __init__(self, size: int, activity: str, way_out: str = AGAIN) -> None:
        """Begin with `size` sequences at once; `activity` passes them, for messages.

        Args:
            way_out: what to do where there is no room for one.
        """
        self.size, self._activity, self._way_out = size, activity, way_out

    def parts(self, count: int) -> Iterator[slice]:
        """Cut `count` sequences into parts of at most `size`."""
        return (slice(start, min(start + self.size, count)) for start in range(0, count, self.size))

    def fitting(self, action: Callable[[], T]) -> T:
        """Return what `action` returns, begun anew with half the sequences at once until the device has room for it.

        Raises:
            ResourceError: there is no room for a single sequence.
        """
        while True:
            try:
                return action()
            except torch.OutOfMemoryError as error:
                reason = str(error).partition(".")[0]
            # Out of the handler, whose traceback holds on to what did not fit.
            self.halve(reason)

    def halve(self, reason: str) -> None:
        """Let half as many pass at once from here on; ResourceError where it is one already."""
        if processes.size() > 1:  # the others would go on with what they have room for
            raise ResourceError(
                f"{self._activity}: {reason}; several processes do not halve what passes at once: use a smaller "
                "method.training.batch, calib.batch or eval.batch"
            )
        if self.size == 1:
            raise ResourceError(f"{self._activity}: {reason} with one sequence at a time; {self._way_out}")
        self.size = (self.size + 1) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warn(f"{self._activity}: {reason}; {self.size} sequences at a time from here on, with the same result")


def in_parts(function: Callable[[Tensor], Tensor], hidden: Tensor, micro: MicroBatch) -> Tensor:
    """Return `function(hidden)` for `hidden (n, …)` whose rows do not depend on each other, in parts that fit."""

    def run() -> Tensor:
        outputs = [function(hidden[part]) for part in micro.parts(len(hidden))]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    return micro.fitting(run)
