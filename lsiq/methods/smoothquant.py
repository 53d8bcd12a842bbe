"""SmoothQuant: move the range of outlier channels from the activations into the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from lsiq.errors import InputError
from lsiq.fold import fold_scale
from lsiq.methods.base import BlockResult, Context, Method, Need, quantize_prepared
from lsiq.parts.equivalent import smoothing_scale
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor

    from lsiq.config import QuantSettings
    from lsiq.models.block import Block


@settings
class SmoothQuant:
    """Scale `s_j = max|x_j|^α / max|W_:j|^(1-α)` per channel, folded into the norms; `then` quantises what comes out.

    The weights' maximum is taken over all linears that read the channel. Only norms are folded into, as in the paper.

    Source: SmoothQuant (arXiv 2211.10438, equation 4).
    """

    alpha: float = Field(0.5, ge=0, le=1, description="how much of the range moves into the weights, 0 to 1")
    then: Method = Field(description="the method that quantises the smoothed block")

    @property
    def name(self) -> str:
        return "smoothquant" if self.then.name == "rtn" else f"smoothquant+{self.then.name}"

    @property
    def needs(self) -> frozenset[Need]:
        return self.then.needs | frozenset[Need]({"inputs"})

    def quantize_block(self, block: Block, quant: QuantSettings, context: Context) -> BlockResult:
        from lsiq.calib.statistics import extremes

        if block.unfoldable:
            raise InputError(f"method=smoothquant folds scales into norms, but {block.unfoldable}")
        assert context.inputs is not None  # the method asks for them
        ranges = extremes(block, context.inputs, context.batch)
        changed: dict[str, Tensor] = {}
        for group in block.groups:
            if group.kind != "norm":
                continue
            reach = ranges[group.consumers[0]].abs().amax(0)
            scale = smoothing_scale(block, group.consumers, reach, self.alpha)
            changed |= fold_scale(block.weights, group, scale, block.head_dim)
        return quantize_prepared(self.then, block, changed, quant, context)
