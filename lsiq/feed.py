"""Batches of a block's two streams, laid where a recorded step finds them again."""

from __future__ import annotations

import torch
from torch import Tensor

# The share of a GPU's free memory that the streams may take; the rest is for the block and its training state.
RESIDENT_SHARE = 0.25


class Feed:
    """The inputs and targets of one batch after another, in buffers that stay in place.

    Streams that fit into a quarter of the GPU's free memory are moved there whole; others stay on the host and are
    staged through two pinned buffers, so that the host can gather a batch while the GPU still works on the last.

    Args:
        inputs: `(N, T, d)`, what enters the block; handed out in `dtype`.
        targets: `(N, T, d)`, what should leave it; handed out as stored.
        batch: the largest number of sequences in a batch.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        size = inputs.numel() * dtype.itemsize + targets.numel() * targets.element_size()
        self.resident = device.type != "cuda" or size <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
        batch = min(batch, len(inputs))
        self.inputs = inputs.to(device, dtype) if self.resident else inputs
        self.targets = targets.to(device) if self.resident else targets
        self.x = torch.empty((batch, *inputs.shape[1:]), dtype=dtype, device=device)
        self.target = torch.empty((batch, *targets.shape[1:]), dtype=targets.dtype, device=device)
        self._slots = [] if self.resident else [_Pinned(inputs, targets, batch) for _ in range(2)]
        self._turn = 0

    def load(self, samples: Tensor) -> None:
        """Fill the first `len(samples)` places of the buffers `x` and `target`."""
        if self.resident:
            samples = samples.to(self.x.device)
            torch.index_select(self.inputs, 0, samples, out=self.x[: len(samples)])
            torch.index_select(self.targets, 0, samples, out=self.target[: len(samples)])
            return
        self._slots[self._turn].load(self.inputs, self.targets, samples, self.x, self.target)
        self._turn = 1 - self._turn


class _Pinned:
    """One batch in pinned host memory, and the event after which it may be overwritten."""

    def __init__(self, inputs: Tensor, targets: Tensor, batch: int) -> None:
        self.x = torch.empty((batch, *inputs.shape[1:]), dtype=inputs.dtype, pin_memory=True)
        self.target = torch.empty((batch, *targets.shape[1:]), dtype=targets.dtype, pin_memory=True)
        self.free = torch.cuda.Event()

    def load(self, inputs: Tensor, targets: Tensor, samples: Tensor, x: Tensor, target: Tensor) -> None:
        n = len(samples)
        self.free.synchronize()
        torch.index_select(inputs, 0, samples, out=self.x[:n])
        torch.index_select(targets, 0, samples, out=self.target[:n])
        x[:n].copy_(self.x[:n], non_blocking=True)
        target[:n].copy_(self.target[:n], non_blocking=True)
        self.free.record()
