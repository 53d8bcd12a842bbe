"""Cross-layer learning: the loss of a block may look at what the blocks behind it make of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lsiq.learning.measure import Measure, measure
from lsiq.learning.trained import Trained, start_parts
from lsiq.learning.weight_path import WeightPath, compiles, on_path
from lsiq.models.block import Block, BlockFunction
from lsiq.models.context import Context
from lsiq.models.rounding import round_to_nearest
from lsiq.parts.base import Part

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings
    from lsiq.learning.schedule import Training


@dataclass(frozen=True)
class LookAheadLoss:
    """The outputs that a loss compares: a block's own and those of the blocks behind it.

    Attributes:
        weights: of each output's term in the loss.
        targets: `(N, T, d)` each, what the float blocks make of the float stream; the block's own first.
        measures: what an error of each output counts relative to.
        later: give the functions of the later blocks at the present parameters.
        companions: the later blocks that are trained along, if any.
        compiled: whether outputs and targets are compared by a compiled function.
    """

    weights: Sequence[float]
    targets: Sequence[Tensor]
    measures: Sequence[Measure]
    later: Sequence[Callable[[], BlockFunction]] = ()
    companions: Sequence[Trained] = ()
    compiled: bool = False

    def loss(self, out: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """Return `Σ weight · error` for the block's outputs `(batch, T, d)`."""
        loss = self.weights[0] * self.error(out, targets[0])
        for index, function in enumerate(self.later, 1):
            out = function()(out)
            loss = loss + self.weights[index] * self.error(out, targets[index], index)
        return loss

    def error(self, out: Tensor, target: Tensor, index: int = 0) -> Tensor:
        """Return the error of an output, by default of the block's own, in its measure."""
        measured = self.measures[index]
        return measured.mean(out, target, self.compiled and torch.is_grad_enabled()) / measured.power


def look_ahead(
    parts: Sequence[Part],
    training: Training,
    block: Block,
    quant: QuantSettings,
    context: Context,
    path: WeightPath = "plain",
) -> LookAheadLoss:
    """Return the window of a block; it is shorter where fewer blocks follow (see `LookAhead.within`).

    Source: CL (arXiv 2407.15508). With `later=learned` the later blocks are trained along, as in the sliding windows
    of CBQ (arXiv 2312.07950); unlike there they start anew when their turn comes.
    """
    assert context.targets is not None
    count = 0 if context.ahead is None else min(training.ahead.blocks, context.ahead.depth - 1 - block.index)
    weights = training.ahead.within(count)
    targets = [context.targets]
    later: list[Callable[[], BlockFunction]] = []
    companions: list[Trained] = []
    for distance in range(1, count + 1):
        assert context.ahead is not None
        following = context.ahead.block(block.index + distance)
        running = on_path(training.in_precision(following, context.cache), path, training)
        if training.ahead.later == "learned":
            following_context = replace(context, inputs=targets[-1])
            following_quant = quant.in_block(following.index)
            states = start_parts(parts, following, following_quant, following_context)
            companion = Trained(parts, states, running, following_quant, path).trainable()
            companions.append(companion)
            later.append(companion.function)
        else:
            function = _fixed(running, quant, training.ahead.later == "rtn")
            later.append(lambda function=function: function)
        targets.append(context.ahead.stream(block.index + distance))
    device = block.device
    if training.relative_to == "stream":  # of the block itself, for the later ones too
        measures = [measure(context.targets, "stream", context.samples, device)] * len(targets)
    else:
        measures = [measure(target, training.relative_to, context.samples, device) for target in targets]
    return LookAheadLoss(weights, targets, measures, later, companions, compiles(path, block))


def _fixed(block: Block, quant: QuantSettings, rounded: bool) -> BlockFunction:
    """The block as it is, or rounded to nearest with its activations in their format."""
    return block.with_result(round_to_nearest(block, quant), quant.running) if rounded else block.with_weights({})
