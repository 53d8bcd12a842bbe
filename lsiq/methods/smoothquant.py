"""SmoothQuant: move the range of outlier channels from the activations into the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.errors import InputError
from lsiq.methods.base import Method
from lsiq.methods.wrapper import Transform, Wrapper
from lsiq.models.context import Context, Need
from lsiq.models.folding import fold_scale
from lsiq.parts.equivalent import smoothing_scale
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor

    from lsiq.formats.quant import QuantSettings
    from lsiq.models.block import Block
    from lsiq.models.spec import Group


Place = Literal["norm", "value", "down"]


@settings
class SmoothQuant(Wrapper):
    """Scale `s_j = max|x_j|^α / max|W_:j|^(1-α)` per channel, folded into the norms; `then` quantises what comes out.

    The weights' maximum is taken over all linears that read the channel. The paper folds into norms only; `value`
    also folds the output projection's channels into the value projection, `down` those of the block's last linear
    into the linear before it, which a gate or a ReLU lets through.

    Source: SmoothQuant (arXiv 2211.10438, equation 4).
    """

    places: list[Place] = Field(["norm"], min_length=1, description="a list of norm, value and down")
    alpha: float = Field(0.5, ge=0, le=1, description="how much of the range moves into the weights, 0 to 1")
    then: Method = Field(description="the method that quantises the smoothed block")
    label, reads = "smoothquant", frozenset[Need]({"inputs"})

    def transform(self, block: Block, quant: QuantSettings, context: Context) -> Transform:
        from lsiq.calib.input_statistics import extremes
        from lsiq.models.folding import channels_of, gather

        if block.unfoldable:
            raise InputError(f"method=smoothquant folds scales into norms, but {block.unfoldable}")
        assert context.inputs is not None  # the method asks for them
        ranges = extremes(block, context.inputs, context.batch)
        changed: dict[str, Tensor] = {}
        # From the back: a linear that writes channels also reads some, and its rows' scale decides how large it is.
        for group in reversed(self._groups(block)):
            now = replace(block, weights={**block.weights, **changed})
            channels = channels_of(now.weights, group)
            reach = gather(ranges[group.consumers[0]].abs().amax(0), channels, block.head_dim)
            scale = smoothing_scale(now, group.consumers, reach, self.alpha)
            changed |= fold_scale(now.weights, group, scale, block.head_dim)
        return Transform(changed)

    def _groups(self, block: Block) -> list[Group]:
        place_of: dict[str, Place] = {"norm": "norm", "value": "value", "linear": "down"}
        return [group for group in (*block.groups, *block.homogeneous) if place_of[group.kind] in self.places]
