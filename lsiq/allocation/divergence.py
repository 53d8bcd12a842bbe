"""How far what a model predicts moves when some of its linears are rounded."""

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

_FLOAT, _BASE = "float", "base"

# By unit, the index of its choice, or None for float.
Assignment = Sequence[int | None]

# What a choice makes of a linear, `weights of the block, dotted name, index of the choice -> weight (out, in)`.
Rounding = Callable[[Block, str, int], Tensor]


def to_nearest(choices: Sequence[WeightFormat]) -> Rounding:
    """Return what rounds a linear of a block to nearest in one of the choices."""
    return lambda block, name, choice: quantize(block.weights[name], choices[choice], name).decode()


@dataclass(frozen=True)
class Trials:
    """What divergences are measured with.

    Attributes:
        model: float.
        tokens: `(N, T)`.
        units: all that have a choice.
        choices: formats; one of 16 bits leaves a unit in float.
        rounded: what a choice makes of a linear.
        batch: sequences that pass through a block at once.
        room: bytes that streams may take at once; more trials than fit take more passes.
        advance: called after each block of each pass.
    """

    model: Model
    tokens: Tensor
    units: Sequence[Unit]
    choices: Sequence[WeightFormat]
    rounded: Rounding
    batch: int
    room: int
    advance: Callable[[], None]

    @property
    def all_float(self) -> list[int | None]:
        return [None] * len(self.units)

    @torch.no_grad()
    def divergences(self, trials: Sequence[Assignment], base: Assignment | None = None) -> Tensor:
        """Return the mean divergence of predictions of each trial, float64, nats per predicted token.

        KL(float ‖ tried), over the tokens of all sequences but the first of each. A trial leaves the stream of `base`
        at the first block in which it differs, so that one pass over the weights serves as many trials as there is
        room for their streams; None is the float model.
        """
        base = self.all_float if base is None else base
        hidden, kwargs = self.model.embed(self.tokens, self.batch)
        at_once = _at_once(hidden.nbytes, self.room)
        means = torch.zeros(len(trials), dtype=torch.float64)
        for start in range(0, len(trials), at_once):
            group = trials[start : start + at_once]
            outputs = self._run(hidden, kwargs, group, base)
            batches = {name: stream.split(self.batch) for name, stream in outputs.items()}
            scores = score_tokens(self.model, self.tokens.split(self.batch), batches, _FLOAT)
            for number in range(len(group)):
                divergence = scores[str(number)].divergence
                assert divergence is not None  # there is a reference
                means[start + number] = divergence.double().mean().item()
        return means

    def single(self) -> Tensor:
        """Return the divergences `(units, choices)` of one unit in one choice, the rest in float."""
        places = [
            (row, column) for row in range(len(self.units)) for column, fmt in enumerate(self.choices) if fmt.bits < 16
        ]
        means = torch.zeros(len(self.units), len(self.choices), dtype=torch.float64)
        trials = [changed(self.all_float, row, column) for row, column in places]
        for (row, column), mean in zip(places, self.divergences(trials), strict=True):
            means[row, column] = mean
        return means

    def _run(
        self, hidden: Tensor, kwargs: Mapping[str, object], trials: Sequence[Assignment], base: Assignment
    ) -> dict[str, Tensor]:
        """Return what leaves the last block, `(N, T, d)`, of the float model and of each trial by its number."""
        model = self.model
        assignments = {str(number): trial for number, trial in enumerate(trials)}
        streams, followed = {_FLOAT: hidden}, _FLOAT
        assignments[_FLOAT] = self.all_float
        if any(choice is not None for choice in base):
            streams[_BASE], assignments[_BASE], followed = hidden, base, _BASE
        for index in range(model.depth):
            block = model.block(index, kwargs)
            variants = _Variants(self, block)
            for name, assignment in assignments.items():
                if name not in streams and variants.differ(assignment, base):
                    streams[name] = streams[followed]
            streams = {
                name: run_stream(variants.function(assignments[name]), stream, self.batch, model.device)
                for name, stream in streams.items()
            }
            self.advance()
        outputs = {name: streams.get(name, streams[followed]) for name in assignments if name != _BASE}
        return {name: model.rotated_back(stream) for name, stream in outputs.items()}


class _Variants:
    """A block with its linears in whatever choices; each linear is rounded once for each."""

    def __init__(self, trials: Trials, block: Block) -> None:
        self.trials, self.block = trials, block
        self.rows = [row for row, unit in enumerate(trials.units) if unit.block == block.index]
        self.weights: dict[tuple[str, int], Tensor] = {}

    def differ(self, first: Assignment, second: Assignment) -> bool:
        """Whether the block is not the same in two assignments."""
        return any(first[row] != second[row] for row in self.rows)

    def function(self, assignment: Assignment):  # type: ignore[no-untyped-def]
        weights = {}
        for row in self.rows:
            choice = assignment[row]
            if choice is None or self.trials.choices[choice].bits >= 16:
                continue
            for name in (f"{linear}.weight" for linear in self.trials.units[row].linears):
                if (name, choice) not in self.weights:
                    self.weights[name, choice] = self.trials.rounded(self.block, name, choice)
                weights[name] = self.weights[name, choice]
        return self.block.with_weights(weights)


def changed(assignment: Assignment, unit: int, choice: int) -> list[int | None]:
    """Return the assignment with another choice for one unit."""
    return [choice if row == unit else current for row, current in enumerate(assignment)]


def passes(model: Model, tokens: Tensor, trials: int, room: int) -> int:
    """Return how many passes over the weights so many trials take."""
    bytes_per_stream = tokens.numel() * model.config.hidden_size * model.dtype.itemsize
    return -(-trials // _at_once(bytes_per_stream, room))


def _at_once(stream: int, room: int) -> int:
    """How many trials fit into `room` bytes beside the float stream and the one that is being made."""
    return max(1, room // max(stream, 1) - 2)
