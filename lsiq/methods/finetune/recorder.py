"""Optimizer steps of models small enough that launching a step takes longer than its work."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lsiq.learning.step import WARM_STEPS
from lsiq.runtime import processes
from lsiq.runtime.micro_batch import MicroBatch
from lsiq.runtime.terminal import warn

# Of models with more numbers than this a step's launches are hidden behind its work.
LARGEST = 2**28

Gradients = Callable[[Tensor, Tensor], Tensor]
"""Leaves the gradients of a batch, which enters as `(n, T, d)`, in the parameters; returns its loss."""


class Recorder:
    """Records a step, gradients and optimizer, as a CUDA graph, and replays it on other batches at other rates.

    A replay launches what the recorded step launched, so its result is the same.

    Args:
        optimizers: such as a graph can hold, whose rates are tensors on the device.
        gradients: what comes before the optimizer moves.
        size: sequences of the batches that are recorded; others take their step as it comes.
        micro: how many of them pass at once; where that changes a step is recorded anew.
    """

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], gradients: Gradients, size: int, micro: MicroBatch
    ) -> None:
        self.optimizers, self.gradients, self.size, self.micro = optimizers, gradients, size, micro
        self.graph: torch.cuda.CUDAGraph | None = None
        self.recorded_size, self.warm, self.room = micro.size, 0, True

    def step(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Take a step on a batch, and return its loss.

        Args:
            hidden, target: `(n, T, d)`, what enters the first block that is trained and what the last is to give, or
                `(n, T)` tokens.
        """
        if len(hidden) == self.size and self.warm >= WARM_STEPS and self._recorded(hidden, target):
            assert self.graph is not None
            self.hidden.copy_(hidden)
            self.target.copy_(target)
            self.graph.replay()
            return self.loss.clone()
        loss = self.micro.fitting(lambda: self.gradients(hidden, target))
        self._move()
        self.warm += len(hidden) == self.size
        return loss

    def _recorded(self, hidden: Tensor, target: Tensor) -> bool:
        """Whether there is a recorded step; it is recorded on this batch where there is none yet and room for one."""
        if self.room and (self.graph is None or self.recorded_size != self.micro.size):
            self.graph = None  # what it took is free again
            self.graph = self._record(hidden, target)
        return self.graph is not None

    def _record(self, hidden: Tensor, target: Tensor) -> torch.cuda.CUDAGraph | None:
        self.hidden, self.target = hidden.clone(), target.clone()
        self.recorded_size, graph = self.micro.size, torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # what a graph takes it takes beside what is kept for reuse
        try:
            with torch.cuda.graph(graph):
                self.loss = self.gradients(self.hidden, self.target)
                self._move()
        except torch.OutOfMemoryError as error:
            self.room = False
            warn(f"fine-tuning: no room to record a step ({str(error).partition('.')[0]}); each is launched by itself")
            return None
        return graph

    def _move(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def recordable(device: torch.device, weights: int) -> bool:
    """Return whether steps on a device are recorded: on a GPU, in one process, of models with few weights."""
    return device.type == "cuda" and processes.size() == 1 and weights <= LARGEST
