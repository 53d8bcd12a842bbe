"""Dense: every weight of a block is trained before it is rounded."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.parts.base import Draft, Hardening, PartState, PartTraits, left_out
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor

    from lsiq.formats.quant import QuantSettings
    from lsiq.models.block import Block
    from lsiq.models.context import Context


@settings
class Dense(PartTraits):
    """A dense increment: `W' = W + D` with every entry of `D (out, in)` trained from 0.

    It is what `Singular` approaches with a corner as large as the core. The grid follows `W'`; with `Clip` behind it
    the step sizes are trained as well. `tensors=all` also trains the norms and the biases, which cost nothing at
    inference. With `unit=step` the entries of `D` count in steps of the float weights' grid, so that one rate suits
    every width of weights and every scale of them.

    With `hardening` the rounding sets in slowly, as that of `Rounding` does, but a weight beyond the ends of its grid
    is taken as half a step beyond them.

    Source: the block-wise stage of EfficientQAT (arXiv 2407.11062, section 3.2).
    Deviation: step sizes follow the weights' range times learned factors; there they are parameters of their own.
    """

    lr: float | None = Field(
        gt=0, description="learning rate of the increments, above 0; null: travel / steps, of 16 at least"
    )
    travel: float = Field(
        1.0, gt=0, description="with lr=null: how far an increment goes in steps that all point one way"
    )
    unit: Literal["weight", "step"] = Field(
        "weight", description="what increments and their rate count in: weight, or step (of each group's grid)"
    )
    tensors: Literal["linears", "all"] = Field(
        "linears", description="linears, or all: with the norms and the biases of the block"
    )
    hardening: Hardening = 0.0

    def __post_init__(self) -> None:
        if self.unit == "step" and self.tensors == "all":
            raise ValueError("unit=step: norms and biases have no grid to count steps of; use tensors=linears")

    @property
    def name(self) -> str:
        return "dense"

    def start(self, block: Block, quant: QuantSettings, context: Context) -> PartState:
        del context
        names = (
            block.linears if self.tensors == "linears" else tuple(n for n in block.weights if n not in block.untouched)
        )
        parameters = {f"{name}:change": block.weights[name].new_zeros(block.weights[name].shape) for name in names}
        constants: dict[str, Tensor] = {}
        if self.unit == "step":
            for name in names:
                constants[f"{name}:step"] = quant.of(name).mean_steps(block.weights[name])
        if self.hardening:
            constants["done"] = next(iter(parameters.values())).new_ones(())
        return PartState(parameters, constants, bulky=frozenset(parameters))

    def apply(self, draft: Draft, state: PartState, block: Block) -> Draft:
        del block
        names = [key.removesuffix(":change") for key in state.parameters]
        changed = {name: draft.weights[name] + self.change(state, name) for name in names}
        draft = replace(draft, weights={**draft.weights, **changed})
        if not self.hardening:
            return draft
        return replace(draft, softness=left_out(state, self.hardening), reach=0.5)

    def change(self, state: PartState, name: str) -> Tensor:
        """Return what is added to a tensor."""
        change = state.parameters[f"{name}:change"]
        if (step := state.constants.get(f"{name}:step")) is None:
            return change
        return (change.unflatten(1, (step.shape[1], -1)) * step).flatten(1)
