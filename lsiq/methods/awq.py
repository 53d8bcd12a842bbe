"""AWQ: scale the channels that matter most, clip the ranges that cost most, then round with any method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.errors import InputError
from lsiq.methods.base import Method, chain
from lsiq.methods.rtn import RTN
from lsiq.methods.wrapper import Transform, Wrapper
from lsiq.models.context import Context, Need
from lsiq.runtime.processes import share
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor

    from lsiq.calib.scale_search import BlockError, InputStatistics
    from lsiq.formats.quant import QuantSettings
    from lsiq.models.block import Block


@settings
class AWQ(Wrapper):
    """Activation-aware scales and clipping before the rounding of `then`.

    For each group of channels `x` between a producer and the linears that read them (norm → q, k, v; v → o;
    norm → gate, up; up → down), with `W (out, in)`:

        s = mean|x|^r / sqrt(max · min),   r = argmin over 0, 1/ratios, … of  ‖(W - round(W diag(s)) diag(s)⁻¹) x‖²

    `s` is folded: the producer is divided by it, `W diag(s)` is what gets rounded, so the float function stays as it
    was. Then every linear but query and key is clamped, group by group, to the range `±c · max|w|`, `c` from 1 down
    to `1 - shrink` in `clip_steps` steps, whose rounding costs the least output error. The clamped weights are handed
    to `then`, so its grids span the clipped ranges.

    `search` says whose error chooses `r`: that of the linears that read the channels, over all calibration tokens, or
    that of the whole block's output over `samples` sequences.

    Source: Lin et al., AWQ (arXiv 2306.00978), section 3.2, equations 4 and 5, and its public code.
    Deviation: the public code judges q, k, v by the attention's output and gate, up by the MLP's. It skips v → o under
    grouped-query attention; here a value channel takes the largest mean of the query heads it feeds. It scales fc1 →
    fc2 of OPT as well; that is not among the groups of this package. Inputs come from the quantised stream. Clipping
    is judged on all tokens (through their Gram matrix), not on 512, and in steps of `shrink / clip_steps`, 2.5 %, not
    5 %. Rounding of activations is not part of either search.
    """

    search: Literal["linear", "block"] = Field("linear", description="linear or block: whose output error decides")
    ratios: int = Field(20, ge=1, description="exponents tried, evenly from 0 to below 1, at least 1")
    samples: int = Field(8, ge=1, description="sequences that search=block runs, at least 1")
    clip: bool = Field(True, description="true searches clipping ranges as well")
    clip_steps: int = Field(20, ge=1, description="clipping ranges tried, at least 1")
    shrink: float = Field(0.5, gt=0, lt=1, description="how far the range may shrink, between 0 and 1")
    then: Method = Field(default_factory=RTN, description="the method that rounds: a _target_ with its settings")
    label, reads = "awq", frozenset[Need]({"inputs"})

    def __post_init__(self) -> None:
        if self.clip and any(method.adds_branches for method in chain(self.then)):
            raise ValueError(
                "then: a low-rank product would repair the clipped weights instead of the float ones; put it outside "
                "(method=lqer method@method.then=awq) or set method.clip=false"
            )

    def transform(self, block: Block, quant: QuantSettings, context: Context) -> Transform:
        """Return the tensors that scaling changes, the linears that clipping changes, and each group's exponent.

        Raises:
            InputError: scales cannot be folded into this model.
        """
        import torch

        from lsiq.calib.scale_search import observe_inputs
        from lsiq.runtime.timing import measured_stage

        if block.unfoldable is not None:
            raise InputError(f"method {self.name} does not fit this {block.spec.model_type} model: {block.unfoldable}")
        assert context.inputs is not None
        with torch.no_grad():
            with measured_stage("statistics"):
                statistics = observe_inputs(block, context.inputs, context.batch)
            with measured_stage("scales"):
                folded, metrics = self._scale(block, quant, context, statistics)
            with measured_stage("clipping"):
                clipped = self._clip(block, quant, folded, statistics) if self.clip else {}
        return Transform(folded, clipped, metrics=metrics)

    def _scale(
        self, block: Block, quant: QuantSettings, context: Context, statistics: dict[str, InputStatistics]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Search and fold the scale of every group; `statistics` become those of the scaled channels."""
        from lsiq.calib.scale_search import LinearError, search_scale
        from lsiq.models.folding import fold_scale, spread

        changed: dict[str, Tensor] = {}
        metrics: dict[str, float] = {}
        block_error = self._block_error(block, context) if self.search == "block" else None
        for group in block.groups:
            statistic = statistics[group.consumers[0]]
            judge = block_error or LinearError(statistic.gram)
            # Against the block as it came: scaling one group's rows changes no rounding of another's columns.
            ratio, scale = search_scale(block, group, statistic, quant, self.ratios, judge)
            changed |= fold_scale({**block.weights, **changed}, group, scale, block.head_dim)
            scaled = statistic.scaled(spread(scale, len(statistic.mean_abs), block.head_dim))
            statistics |= dict.fromkeys(group.consumers, scaled)
            metrics[f"ratio/{group.producer}"] = ratio
        return changed, metrics

    def _block_error(self, block: Block, context: Context) -> BlockError:
        from lsiq.calib.scale_search import BlockError

        assert context.inputs is not None
        indices = range(0, context.samples, max(1, context.samples // self.samples))[: self.samples]
        local = share(context.samples)
        rows = [index - local.start for index in indices if local.start <= index < local.stop]
        return BlockError(block, context.inputs[rows], context.batch)

    def _clip(
        self,
        block: Block,
        quant: QuantSettings,
        folded: dict[str, Tensor],
        statistics: dict[str, InputStatistics],
    ) -> dict[str, Tensor]:
        """Return the clamped linears; query and key keep their range, for attention scores multiply their errors."""
        from lsiq.calib.scale_search import search_clip

        clipped = {}
        for name in (weight.removesuffix(".weight") for weight in block.linears):
            if name not in (block.spec.query, block.spec.key):
                weight = folded.get(f"{name}.weight", block.weights[f"{name}.weight"])
                gram = statistics[name].gram
                fmt = quant.of(name)
                clipped[f"{name}.weight"] = search_clip(weight, gram, fmt, self.clip_steps, self.shrink)
        return clipped
