"""Dense: every weight of a block is trained before it is rounded."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.parts.base import Draft, PartState
from lsiq.settings import settings

if TYPE_CHECKING:
    from lsiq.config import QuantSettings
    from lsiq.methods.base import Context
    from lsiq.models.block import Block


@settings
class Dense:
    """A dense increment: `W' = W + D` with every entry of `D (out, in)` trained from 0.

    It is what `Singular` approaches with a corner as large as the core. The grid follows `W'`; with `Clip` behind it
    the step sizes are trained as well. `tensors=all` also trains the norms and the biases, which cost nothing at
    inference.

    Source: the block-wise stage of EfficientQAT (arXiv 2407.11062, section 3.2).
    Deviation: step sizes follow the weights' range times learned factors; there they are parameters of their own.
    """

    lr: float | None = Field(1e-3, gt=0, description="learning rate of the increments, above 0; null: 1 / steps")
    tensors: Literal["linears", "all"] = Field(
        "linears", description="linears, or all: with the norms and the biases of the block"
    )

    @property
    def name(self) -> str:
        return "dense"

    def start(self, block: Block, quant: QuantSettings, context: Context) -> PartState:
        del quant, context
        names = block.linears if self.tensors == "linears" else tuple(block.weights)
        parameters = {f"{name}:change": block.weights[name].new_zeros(block.weights[name].shape) for name in names}
        return PartState(parameters, bulky=frozenset(parameters))

    def apply(self, draft: Draft, state: PartState, block: Block) -> Draft:
        del block
        changed = {
            key.removesuffix(":change"): draft.weights[key.removesuffix(":change")] + change
            for key, change in state.parameters.items()
        }
        return replace(draft, weights={**draft.weights, **changed})
