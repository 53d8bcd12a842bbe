"""How far what a model predicts moves when one unit of its linears is rounded and the rest stays in float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsiq.allocation.units import Unit
from lsiq.evals.perplexity import score_tokens
from lsiq.formats.base import WeightFormat
from lsiq.formats.tensor import quantize
from lsiq.models.block import Block, run_stream
from lsiq.models.loading import Model

_FLOAT = "float"


@dataclass(frozen=True)
class Trial:
    """One unit in one format."""

    unit: Unit
    choice: int
    format: WeightFormat

    def function_of(self, block: Block):  # type: ignore[no-untyped-def]
        """Return the block with the unit rounded to nearest."""
        names = [f"{name}.weight" for name in self.unit.linears]
        return block.with_weights({name: quantize(block.weights[name], self.format, name).decode() for name in names})


@torch.no_grad()
def divergences(
    model: Model,
    tokens: Tensor,
    units: Sequence[Unit],
    choices: Sequence[WeightFormat],
    batch: int,
    room: int,
    advance: Callable[[], None],
) -> Tensor:
    """Return the mean divergence of predictions `(units, choices)`, float64, nats per predicted token.

    KL(float ‖ tried), over the tokens of all sequences but the first of each. A trial leaves the float stream at its
    own block, so that one pass over the weights serves as many trials as there is room for their streams.

    Args:
        tokens: `(N, T)`.
        room: bytes that streams may take at once; more trials than fit take more passes.
        advance: called after each block of each pass.
    """
    trials = [Trial(unit, index, fmt) for unit in units for index, fmt in enumerate(choices) if fmt.bits < 16]
    hidden, kwargs = model.embed(tokens, batch)
    at_once = _at_once(hidden.nbytes, room)
    means = torch.zeros(len(units), len(choices), dtype=torch.float64)
    place = {unit.name: row for row, unit in enumerate(units)}
    for start in range(0, len(trials), at_once):
        group = trials[start : start + at_once]
        outputs = _run(model, hidden, kwargs, group, batch, advance)
        batches = {name: stream.split(batch) for name, stream in outputs.items()}
        scores = score_tokens(model, tokens.split(batch), batches, _FLOAT)
        for number, trial in enumerate(group):
            divergence = scores[str(number)].divergence
            assert divergence is not None  # there is a reference
            means[place[trial.unit.name], trial.choice] = divergence.double().mean().item()
    return means


def passes(model: Model, tokens: Tensor, units: int, choices: int, room: int) -> int:
    """Return how many passes over the weights `divergences` takes."""
    bytes_per_stream = tokens.numel() * model.config.hidden_size * model.dtype.itemsize
    return -(-units * choices // _at_once(bytes_per_stream, room))


def _at_once(stream: int, room: int) -> int:
    """How many trials fit into `room` bytes beside the float stream and the one that is being made."""
    return max(1, room // max(stream, 1) - 2)


def _run(
    model: Model,
    hidden: Tensor,
    kwargs: Mapping[str, object],
    trials: Sequence[Trial],
    batch: int,
    advance: Callable[[], None],
) -> dict[str, Tensor]:
    """Return what leaves the last block, `(N, T, d)`, of the float model and of each trial by its number."""
    streams = {_FLOAT: hidden}
    for index in range(model.depth):
        block = model.block(index, kwargs)
        float_function = block.with_weights({})
        trial_streams = {
            str(number): run_stream(trial.function_of(block), streams[_FLOAT], batch, model.device)
            for number, trial in enumerate(trials)
            if trial.unit.block == index
        }
        streams = {
            name: run_stream(float_function, stream, batch, model.device) for name, stream in streams.items()
        } | trial_streams
        advance()
    return {name: model.rotated_back(stream) for name, stream in streams.items()}
