"""Clip (LWC): learnable clipping of each group's range."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from lsiq.parts.base import Draft, PartState
from lsiq.settings import settings

if TYPE_CHECKING:
    from lsiq.config import QuantSettings
    from lsiq.methods.base import Context
    from lsiq.models.block import Block


@settings
class Clip:
    """Learnable weight clipping: the grid of a group spans `σ(l) · min … σ(u) · max`.

    Source: OmniQuant (arXiv 2308.13137, equation 2); its code starts both logits at 4.0, which clips by 1.8 %, and
    learns them at rate 1e-2 (its text swaps the two rates).
    """

    lr: float = Field(1e-2, gt=0, description="learning rate of the clipping logits, above 0")
    start_logit: float = Field(4.0, gt=-20, lt=20, description="the logit that both ends start from, -20 to 20")

    @property
    def name(self) -> str:
        return "clip"

    def start(self, block: Block, quant: QuantSettings, context: Context) -> PartState:
        del context
        parameters = {}
        for name in block.linears:
            lo, _ = quant.weight.extremes(block.weights[name])
            parameters[f"{name}:low"] = lo.new_full(lo.shape, self.start_logit)
            parameters[f"{name}:high"] = lo.new_full(lo.shape, self.start_logit)
        return PartState(parameters)

    def apply(self, draft: Draft, state: PartState, block: Block) -> Draft:
        p = state.parameters
        clip = {name: (p[f"{name}:low"].sigmoid(), p[f"{name}:high"].sigmoid()) for name in block.linears}
        return Draft(draft.weights, clip)
