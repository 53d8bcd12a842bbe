"""Batches of a block's streams, laid where a recorded step finds them again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The share of a GPU's free memory that the streams may take; the rest is for the block and its training state.
RESIDENT_SHARE = 0.25


def fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes of streams may stay on the device; a CPU has no other place for them."""
    return device.type != "cuda" or size <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]


class Feed:
    """The inputs and targets of one batch after another, in buffers that stay in place.

    Streams that fit into a quarter of the GPU's free memory are there whole; others stay on the host and are staged
    through two pinned buffers, so that the host can gather a batch while the GPU still works on the last.

    Args:
        inputs: `(N, T, d)`, what enters the block; handed out in `dtype`.
        targets: `(N, T, d)` each, what should leave it and the blocks behind it; handed out as stored.
        batch: the largest number of sequences in a batch.
    """

    def __init__(
        self, inputs: Tensor, targets: Sequence[Tensor], batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = inputs.numel() * dtype.itemsize + sum(target.nbytes for target in targets)
        self.resident = inputs.device.type != "cpu" or fits(size, device)
        batch = min(batch, len(inputs))
        self.inputs = inputs.to(device, dtype) if self.resident else inputs
        self.streams = [self.inputs, *(target.to(device) if self.resident else target for target in targets)]
        self.x = torch.empty((batch, *inputs.shape[1:]), dtype=dtype, device=device)
        self.targets = [
            torch.empty((batch, *target.shape[1:]), dtype=target.dtype, device=device) for target in targets
        ]
        self._slots = [] if self.resident else [_Pinned(self.streams, batch) for _ in range(2)]
        self._turn = 0

    def load(self, samples: Tensor) -> None:
        """Fill the first `len(samples)` places of the buffers `x` and `targets`."""
        buffers = [self.x, *self.targets]
        if self.resident:
            samples = samples.to(self.x.device)
            for stream, buffer in zip(self.streams, buffers, strict=True):
                torch.index_select(stream, 0, samples, out=buffer[: len(samples)])
            return
        self._slots[self._turn].load(self.streams, samples, buffers)
        self._turn = 1 - self._turn


class _Pinned:
    """One batch in pinned host memory, and the event after which it may be overwritten."""

    def __init__(self, streams: Sequence[Tensor], batch: int) -> None:
        self.places = [torch.empty((batch, *s.shape[1:]), dtype=s.dtype, pin_memory=True) for s in streams]
        self.free = torch.cuda.Event()

    def load(self, streams: Sequence[Tensor], samples: Tensor, buffers: Sequence[Tensor]) -> None:
        n = len(samples)
        self.free.synchronize()
        for stream, place in zip(streams, self.places, strict=True):
            torch.index_select(stream, 0, samples, out=place[:n])
        for place, buffer in zip(self.places, buffers, strict=True):
            buffer[:n].copy_(place[:n], non_blocking=True)
        self.free.record()
