"""What the linears behind the norms of a float model read, whose outliers a rotation of the stream spreads."""

from __future__ import annotations

import torch
from torch import Tensor

from lsiq.calib.input_statistics import visit_inputs
from lsiq.models.block import run_stream
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
    """
    share = processes.share(len(tokens))
    hidden, kwargs = model.embed(tokens[share], batch)
    chosen: list[Tensor] = []
    for index in range(model.depth):
        block = model.block(index, kwargs)
        readers = [group.consumers[0] for group in block.groups if group.kind == "norm"]
        each = -(-count // (model.depth * len(readers)))
        drawn = {}
        for name in readers:
            places = torch.randperm(tokens.numel(), generator=generator)[:each]
            drawn[name] = _Drawn(places.sort().values, share.start * tokens.shape[1])
        visit_inputs(block, {}, hidden, batch, readers, lambda name, x, drawn=drawn: drawn[name].show(x))
        chosen += [torch.cat(processes.gather(torch.cat(of_norm.taken))) for of_norm in drawn.values()]
        hidden = run_stream(block.with_weights({}), hidden, batch, model.device)
    return torch.cat(chosen).to(model.device)


class _Drawn:
    """The states of a stream that stand at some places, whichever batches and processes it comes in.

    Args:
        places: in order, of the stream of all processes.
        seen: how many states come before those of this process.
    """

    def __init__(self, places: Tensor, seen: int) -> None:
        self._places, self._seen, self.taken = places, seen, list[Tensor]()

    def show(self, states: Tensor) -> None:
        here = self._places[(self._places >= self._seen) & (self._places < self._seen + len(states))] - self._seen
        self.taken.append(states[here.to(states.device)].float().cpu())
        self._seen += len(states)
