"""Each process's part of a batch: the sequences it passes through the block, and how it gets those that others hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lsiq.runtime import processes


@dataclass(frozen=True)
class BatchShare:
    """What this process does of a batch of sequences.

    Attributes:
        rows: `(n,)`, which of this process's own sequences are sent, those for the first process first.
        sent, received: how many sequences go to and come from each process.
        weight: the share of the batch; a process without any takes one of another's and weighs it with 0.
    """

    rows: Tensor
    sent: list[int]
    received: list[int]
    weight: float

    @property
    def count(self) -> int:
        """How many sequences this process passes through the block."""
        return sum(self.received)


def share_of_batch(samples: Tensor, total: int) -> BatchShare:
    """Return this process's part of the batch `samples (n,)`, indices among `total` sequences.

    Each takes as many as its share of the batch counts, those that it holds first: a batch is a sum, so only what some
    hold beyond their share has to move. Every process knows what each of the others holds and takes, so nothing is
    asked. The order in which a part comes in depends on `samples` alone, and so is the same for all streams.
    """
    samples = samples.cpu()
    bounds = [processes.share(total, process) for process in range(processes.size())]
    by_process = [samples[(samples >= bound.start) & (samples < bound.stop)] for bound in bounds]
    shares = [processes.share(len(samples), process) for process in range(processes.size())]
    counts = [share.stop - share.start for share in shares]
    spare = torch.cat([part[count:] for part, count in zip(by_process, counts, strict=True)])
    shortfalls = [max(0, count - len(part)) for part, count in zip(by_process, counts, strict=True)]
    batch_shares = [
        torch.cat([part[:count], extra])
        for part, count, extra in zip(by_process, counts, spare.split(shortfalls), strict=True)
    ]
    batch_shares = [part if len(part) else samples[:1] for part in batch_shares]
    bound, indices = bounds[processes.rank()], batch_shares[processes.rank()]
    rows = [part[(part >= bound.start) & (part < bound.stop)] - bound.start for part in batch_shares]
    received = [int(((indices >= other.start) & (indices < other.stop)).sum()) for other in bounds]
    return BatchShare(torch.cat(rows), [len(row) for row in rows], received, counts[processes.rank()] / len(samples))


def exchange(part: BatchShare, outgoing: Tensor, received: Tensor) -> None:
    """Send the sequences `outgoing (n, …)`, `part.rows` of a stream, and fill `received (count, …)` with what comes."""
    dist.all_to_all_single(received, outgoing, part.received, part.sent)


def fetch(stream: Tensor, samples: Tensor, total: int) -> tuple[Tensor, float]:
    """Return this process's part of a batch of a stream `(N, …)` held in shares, and the part's weight.

    Args:
        samples: `(n,)` indices among the `total` sequences of all processes.
    """
    if processes.size() == 1:
        return stream[samples], 1.0
    part = share_of_batch(samples, total)
    received = stream.new_empty((part.count, *stream.shape[1:]))
    exchange(part, stream[part.rows].contiguous(), received)
    return received, part.weight
