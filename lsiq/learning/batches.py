"""Batches of a block's streams, laid where a recorded step finds them again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lsiq.runtime import processes, streams
from lsiq.runtime.batch_exchange import exchange, share_of_batch
from lsiq.runtime.device import fits


class BatchFeeder:
    """The inputs and targets of one batch after another, in buffers that stay in place.

    Of several processes each holds a share of the streams and gets a share of every batch.

    Streams that fit into a quarter of the GPU's free memory are there whole; others stay on the host and are staged
    through two pinned buffers, so that the host can gather a batch while the GPU still works on the last.

    Args:
        inputs: `(N, T, d)`, what enters the block; handed out in `dtype`.
        targets: `(N, T, d)` each, what should leave it and the blocks behind it; handed out as stored.
        batch: the largest number of sequences in a batch.
        total: the sequences of all processes.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Sequence[Tensor],
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        total: int,
    ) -> None:
        size = inputs.numel() * dtype.itemsize + sum(target.nbytes for target in targets)
        self.resident = inputs.device.type != "cpu" or fits(size, device)
        self.total, self.batch = total, min(batch, total)
        # Where indices are wanted; those that say who sends what to whom are read by the host.
        self.place = device if self.resident and processes.size() == 1 else torch.device("cpu")
        on_device = self.resident and device.type == "cuda"
        self.inputs = inputs.to(device, dtype) if on_device else inputs
        self.streams = [self.inputs, *(target.to(device) if self.resident else target for target in targets)]
        dtypes = [dtype, *(target.dtype for target in targets)]

        def buffers(count: int) -> list[Tensor]:
            return [
                torch.empty((count, *stream.shape[1:]), dtype=kind, device=device)
                for stream, kind in zip(self.streams, dtypes, strict=True)
            ]

        share = processes.share(self.batch, process=0)
        self.x, *self.targets = buffers(share.stop)
        # What other processes get of this one's sequences: all of a batch at worst, and one for each.
        most = max(self.batch, processes.size())
        self._outgoing = buffers(most) if processes.size() > 1 else []
        self._slots = [] if self.resident else [_Pinned(self.streams, most) for _ in range(2)]
        self._next = 0
        self._indices = _Indices(most, device) if on_device and self.place != device else None

    def load(self, samples: Tensor) -> tuple[int, float]:
        """Fill the first places of the buffers `x` and `targets` with this process's part of the batch `samples (n,)`.

        Return the number of sequences and their weight in the batch.
        """
        buffers = [self.x, *self.targets]
        if processes.size() == 1:
            self._fill(samples, buffers)
            return len(samples), 1.0
        part = share_of_batch(samples, self.total)
        self._fill(part.rows, self._outgoing)
        for outgoing, buffer in zip(self._outgoing, buffers, strict=True):
            exchange(part, outgoing[: len(part.rows)], buffer[: part.count])
        return part.count, part.weight

    def _fill(self, samples: Tensor, buffers: Sequence[Tensor]) -> None:
        if self.resident:
            if self._indices is not None:
                samples = self._indices.on_device(samples)
            for stream, buffer in zip(self.streams, buffers, strict=True):
                if stream.dtype == buffer.dtype:
                    torch.index_select(stream, 0, samples, out=buffer[: len(samples)])
                else:
                    buffer[: len(samples)] = stream[samples]
            streams.release(*self.streams)
            return
        self._slots[self._next].load(self.streams, samples, buffers)
        self._next = 1 - self._next


class _Pinned:
    """One batch in pinned host memory, and the event after which it may be overwritten."""

    def __init__(self, sources: Sequence[Tensor], batch: int) -> None:
        self.places = [torch.empty((batch, *s.shape[1:]), dtype=s.dtype, pin_memory=True) for s in sources]
        self.free = torch.cuda.Event()

    def load(self, sources: Sequence[Tensor], samples: Tensor, buffers: Sequence[Tensor]) -> None:
        n = len(samples)
        self.free.synchronize()
        for stream, place in zip(sources, self.places, strict=True):
            torch.index_select(stream, 0, samples, out=place[:n])
        streams.release(*sources)
        for place, buffer in zip(self.places, buffers, strict=True):
            buffer[:n].copy_(place[:n], non_blocking=True)
        self.free.record()


class _Indices:
    """Indices that the host makes for the GPU, in pinned memory, so that it need not wait until they are there."""

    def __init__(self, most: int, device: torch.device) -> None:
        self._device, self._next = device, 0
        # Two in turn, each with the event after which it may be overwritten.
        self._slots = [(torch.empty(most, dtype=torch.long, pin_memory=True), torch.cuda.Event()) for _ in range(2)]

    def on_device(self, samples: Tensor) -> Tensor:
        place, free = self._slots[self._next]
        self._next = 1 - self._next
        free.synchronize()
        place = place[: len(samples)].copy_(samples)
        copy = place.to(self._device, non_blocking=True)
        free.record()
        return copy
