"""What the linears behind the norms of a float model read, whose outliers a rotation of the stream spreads."""

from __future__ import annotations

import torch
from torch import Tensor

from lsiq.calib.input_statistics import visit_inputs
from lsiq.errors import InputError
from lsiq.models.block import Block, run_stream
from lsiq.models.loading import Model
from lsiq.runtime import processes


@torch.no_grad()
def normed_states(model: Model, tokens: Tensor, batch: int, count: int, generator: torch.Generator) -> Tensor:
    """Return `(n, d)` states in float32 on the model's device: as many of each norm, and about `count` of all.

    They are inputs of linears in a model whose stream is rotated: gain and bias of the norms are in the weights.

    Args:
        model: with a rotation of its residual stream.
        tokens: `(N, T)` token ids.
        batch: sequences that pass through a block at once.
        generator: draws the tokens, block by block.

    Raises:
        InputError: nothing that is quantised reads a norm.
    """
    mine = tokens[processes.share(len(tokens))]
    hidden, kwargs = model.embed(mine, batch)
    chosen: list[Tensor] = []
    for index in range(model.depth):
        block = model.block(index, kwargs)
        readers = _readers(block)
        if not readers:
            raise InputError("method.steps: no linear that is quantised reads a norm, so there is nothing to narrow")
        each = -(-count // (model.depth * len(readers) * processes.size()))
        drawn = {name: _Drawn(mine.numel(), each, generator) for name in readers}
        visit_inputs(block, {}, hidden, batch, readers, lambda name, x, drawn=drawn: drawn[name].show(x))
        chosen += [torch.cat(of_norm.taken) for of_norm in drawn.values() if of_norm.taken]
        hidden = run_stream(block.with_weights({}), hidden, batch, model.device)
    return torch.cat(processes.gather(torch.cat(chosen))).to(model.device)


class _Drawn:
    """Some states of a stream, whichever batches it comes in."""

    def __init__(self, total: int, count: int, generator: torch.Generator) -> None:
        self._places = torch.randperm(total, generator=generator)[:count].sort().values
        self._seen, self.taken = 0, list[Tensor]()

    def show(self, states: Tensor) -> None:
        here = self._places[(self._places >= self._seen) & (self._places < self._seen + len(states))] - self._seen
        self.taken.append(states[here.to(states.device)].float().cpu())
        self._seen += len(states)


def _readers(block: Block) -> list[str]:
    """Of each norm one linear that is quantised and reads it."""
    quantised = {name.removesuffix(".weight") for name in block.linears}
    readers = (
        [name for name in group.consumers if name in quantised] for group in block.groups if group.kind == "norm"
    )
    return [names[0] for names in readers if names]
