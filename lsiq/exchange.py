"""Each process's part of a batch: the sequences it passes through the block, and how it gets those that others hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lsiq import distributed


@dataclass(frozen=True)
class Part:
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


def part_of(samples: Tensor, total: int) -> Part:
    """Return this process's part of the batch `samples (n,)`, indices among `total` sequences.

    Every process knows which sequences each of the others holds and needs, so nothing is asked.
    """
    samples = samples.cpu()
    n = len(samples)
    needs = [samples[distributed.share(n, process)] for process in range(distributed.size())]
    needs = [needed if len(needed) else samples[:1] for needed in needs]
    bounds = [distributed.share(total, process) for process in range(distributed.size())]
    own = bounds[distributed.rank()]
    rows = [needed[(needed >= own.start) & (needed < own.stop)] - own.start for needed in needs]
    mine = needs[distributed.rank()]
    received = [int(((mine >= held.start) & (mine < held.stop)).sum()) for held in bounds]
    weight = len(samples[distributed.share(n)]) / n
    return Part(torch.cat(rows), [len(row) for row in rows], received, weight)


def exchange(part: Part, sent: Tensor, received: Tensor) -> None:
    """Send the sequences `sent (n, …)`, `part.rows` of a stream, and fill `received (count, …)` with what comes in."""
    dist.all_to_all_single(received, sent, part.received, part.sent)


def fetch(stream: Tensor, samples: Tensor, total: int) -> tuple[Tensor, float]:
    """Return this process's part of a batch of a stream `(N, …)` held in shares, and the part's weight.

    Args:
        samples: `(n,)` indices among the `total` sequences of all processes.
    """
    if distributed.size() == 1:
        return stream[samples], 1.0
    part = part_of(samples, total)
    received = stream.new_empty((part.count, *stream.shape[1:]))
    exchange(part, stream[part.rows].contiguous(), received)
    return received, part.weight
