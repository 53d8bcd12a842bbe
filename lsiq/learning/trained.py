"""The parameters in training, and the weights that they make of a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lsiq.models.block import Block, BlockFunction
from lsiq.models.context import Context
from lsiq.parts.base import Draft, Part, PartState, rounded
from lsiq.runtime import processes

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings
    from lsiq.learning.fused_weights import FusedWeights
    from lsiq.learning.weight_path import WeightPath


def apply_parts(parts: Sequence[Part], states: Sequence[PartState], block: Block) -> Draft:
    """Return the draft that all parts make of a block, in their order. The one function that is trained and stored."""
    draft = Draft(block.weights)
    for part, state in zip(parts, states, strict=True):
        draft = part.apply(draft, state, block)
    return draft


def plain_weights(
    parts: Sequence[Part], states: Sequence[PartState], block: Block, quant: QuantSettings
) -> dict[str, Tensor]:
    """Return every tensor of the block with its parts in these states, its linears on their grids."""
    return rounded(apply_parts(parts, states, block), block.linears, quant)


def compiled_weights(
    parts: Sequence[Part], states: Sequence[PartState], block: Block, quant: QuantSettings
) -> dict[str, Tensor]:
    """`plain_weights`, compiled when it is first called for blocks of a shape."""
    from lsiq.kernels.compiled import compiled

    bare = replace(block, weights={})  # what is compiled outlives the block

    def make(
        parameters: list[dict[str, Tensor]], constants: list[dict[str, Tensor]], weights: dict[str, Tensor]
    ) -> Any:
        part_states = [PartState(p, c) for p, c in zip(parameters, constants, strict=True)]
        return plain_weights(parts, part_states, replace(bare, weights=weights), quant)

    # Which weight is a group's largest must come out the same on the way back.
    formats = repr([quant.of(name) for name in block.linears])
    run = compiled(make, (tuple(map(repr, parts)), formats, block.linears, block.identity, block.dtype), keep_all=True)
    return run([s.parameters for s in states], [s.constants for s in states], dict(block.weights))


def start_parts(parts: Sequence[Part], block: Block, quant: QuantSettings, context: Context) -> list[PartState]:
    """Return where the parts start, each on the block as the parts before it start it."""
    draft, states = Draft(block.weights), list[PartState]()
    for part in parts:
        state = part.start(replace(block, weights=draft.weights), quant, context)
        draft = part.apply(draft, state, block)
        states.append(state)
    processes.take_from_first(p for state in states for p in state.parameters.values())
    return states


@dataclass(frozen=True)
class Trained:
    """What is trained, and how the block is run with it."""

    parts: Sequence[Part]
    states: Sequence[PartState]
    block: Block
    quant: QuantSettings
    path: WeightPath = "plain"
    fused: FusedWeights | None = None

    def weights(self) -> dict[str, Tensor]:
        """Return every tensor of the block at the present parameters, its linears on their grids."""
        if self.fused is not None:
            return self.fused.weights()
        make = compiled_weights if self.path == "compile" else plain_weights
        return make(self.parts, self.states, self.block, self.quant)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters, as `part:name`."""
        for part, state in zip(self.parts, self.states, strict=True):
            for name, parameter in state.parameters.items():
                yield f"{part.name}:{name}", parameter

    def tell(self, progress: float) -> None:
        """Let parts that follow a schedule know that the share `progress` of the steps is behind; 1 is the end."""
        for state in self.states:
            if (clock := state.constants.get("done")) is not None:
                clock.fill_(progress)

    def function(self) -> BlockFunction:
        """Return the block at the present parameters."""
        return self.block.with_weights(self.weights(), self.quant.running)

    def snapshot(self) -> list[PartState]:
        """A copy of the parameters that training does not move."""
        return [
            replace(state, parameters={name: p.detach().clone() for name, p in state.parameters.items()})
            for state in self.states
        ]

    def trainable(self) -> Trained:
        """The same with parameters of its own, which gather gradients."""
        states = self.snapshot()
        for state in states:
            for parameter in state.parameters.values():
                parameter.requires_grad_()
        fused = None
        if self.path == "triton":
            from lsiq.learning.fused_weights import FusedWeights

            fused = FusedWeights(self.parts, states, self.block, self.quant)
        return replace(self, states=states, fused=fused)
