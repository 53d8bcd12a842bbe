"""What a method may look at besides the block itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from lsiq.models.block import Block
    from lsiq.runtime.unfinished import Unfinished


Need = Literal["inputs", "targets"]


@dataclass(frozen=True)
class Ahead:
    """The rest of the model.

    Attributes:
        depth: how many blocks the model has.
        block: gives a later block by its index, float.
        logits: turns what leaves the last block, `(batch, T, d)`, into `(batch, T, vocabulary)`; differentiable.
        stream: gives what leaves a later block of the float model, `(N, T, d)`, by its index.
    """

    depth: int
    block: Callable[[int], Block]
    logits: Callable[[Tensor], Tensor]
    stream: Callable[[int], Tensor]


@dataclass(frozen=True)
class Context:
    """What a method may look at besides the block and the formats.

    Attributes:
        inputs: `(N, T, d)`, what the quantised model feeds the block; None unless the method needs it. Of several
            processes each holds its share of the sequences.
        targets: `(N, T, d)`, what the float block makes of the float stream; None unless the method needs it.
        generator: seeded for this run and block; the only source of chance.
        batch: sequences that pass through the block at once.
        log: takes named numbers of one step or epoch, for the tracker.
        tokens: `(N, T)` calibration tokens of all processes; None for `calib=none`.
        ahead: what lies between this block and the model's logits.
        cache: a folder for what is worth keeping from run to run; None for no such folder.
        unfinished: where long work is kept for a run that is stopped; None for nowhere.
    """

    inputs: Tensor | None
    targets: Tensor | None
    generator: torch.Generator
    batch: int
    log: Callable[[Mapping[str, float]], None]
    tokens: Tensor | None = None
    ahead: Ahead | None = None
    cache: Path | None = None
    unfinished: Unfinished | None = None

    @property
    def samples(self) -> int:
        """The number of sequences, those of all processes."""
        stream = self.tokens if self.tokens is not None else self.inputs
        return 0 if stream is None else len(stream)
