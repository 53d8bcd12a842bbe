"""Scales that protect the salient channels of a block, and ranges that clip its weights, chosen by output error.

The computation behind AWQ. Both searches measure what rounding to nearest does to outputs; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lsiq.calib.gram import check_finite, gram_matrix, output_error
from lsiq.calib.input_statistics import visit_inputs
from lsiq.formats.base import WeightFormat
from lsiq.models.block import Block, run_stream
from lsiq.models.folding import channels_of, gather, spread
from lsiq.models.spec import Group
from lsiq.runtime import processes

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings


MIN_SCALE = 1e-4  # of a silent channel, as in the public code


@dataclass(frozen=True)
class InputStatistics:
    """Of the inputs of one linear: mean magnitude `(in,)` and Gram matrix `XᵀX / tokens (in, in)`, float32."""

    mean_abs: Tensor
    gram: Tensor

    def scaled(self, scale: Tensor) -> InputStatistics:
        """Of the inputs divided by `scale (in,)`."""
        return InputStatistics(self.mean_abs / scale, self.gram / scale[:, None] / scale)


def observe_inputs(block: Block, inputs: Tensor, batch: int) -> dict[str, InputStatistics]:
    """Return the statistics of every linear's inputs by dotted name, from one pass of the stream `(N, T, d)`.

    Sums over batches and processes are float64. Linears of a stage share theirs.

    Raises:
        NumericalError: an input is not finite.
    """
    totals: dict[str, tuple[Tensor, Tensor]] = {}

    def update(name: str, x: Tensor) -> None:
        magnitude, gram = x.abs().sum(0, dtype=torch.float64), gram_matrix(x).double()
        if name in totals:
            magnitude, gram = magnitude + totals[name][0], gram.add_(totals[name][1])
        totals[name] = (magnitude, gram)

    visit_inputs(block, {}, inputs, batch, [stage[0] for stage in block.spec.stages], update)
    tokens = int(processes.add_number(inputs.shape[0] * inputs.shape[1]))
    by_linear = {}
    for stage in block.spec.stages:
        magnitude, gram = (processes.add(total) for total in totals[stage[0]])
        check_finite(gram, block, stage[0])
        statistics = InputStatistics((magnitude / tokens).float(), (gram / tokens).float())
        by_linear |= dict.fromkeys(stage, statistics)
    return by_linear


def candidate_scale(block: Block, group: Group, statistics: InputStatistics, ratio: float) -> Tensor:
    """Return `s = mean|x|^ratio / sqrt(max s · min s)` for the producer's channels `(channels,)`.

    Where one value channel feeds several query heads, it takes the largest of their magnitudes.
    """
    channels = channels_of(block.weights, group)
    scale = gather(statistics.mean_abs, channels, block.head_dim).pow(ratio).clamp(min=MIN_SCALE)
    return scale / (scale.max() * scale.min()).sqrt()


class LinearError:
    """Judges a group's scale by the summed squared output error of the linears that read the channels."""

    def __init__(self, gram: Tensor) -> None:
        self.gram = gram

    def __call__(self, weights: Mapping[str, Tensor], rounded: Mapping[str, Tensor]) -> float:
        return sum(output_error(weights[name], rounded[name], self.gram) for name in rounded)


class BlockError:
    """Judges a group's scale by the squared output error of the whole block on some sequences `(n, T, d)`."""

    def __init__(self, block: Block, inputs: Tensor, batch: int) -> None:
        self.block, self.inputs, self.batch = block, inputs, batch
        self.targets = self._run({})

    def __call__(self, weights: Mapping[str, Tensor], rounded: Mapping[str, Tensor]) -> float:
        del weights  # the block's own, which made the targets
        error = (self._run(rounded) - self.targets).square().sum(dtype=torch.float64).item()
        return processes.add_number(error)

    def _run(self, weights: Mapping[str, Tensor]) -> Tensor:
        device = self.block.device
        return run_stream(self.block.with_weights(weights), self.inputs, self.batch, device).float()


def search_scale(
    block: Block,
    group: Group,
    statistics: InputStatistics,
    quant: QuantSettings,
    ratios: int,
    judge: LinearError | BlockError,
) -> tuple[float, Tensor]:
    """Return the ratio of `0, 1/ratios, …, 1 - 1/ratios` with the least error, and its scale `(channels,)`.

    A candidate's consumers become `round(W diag(s)) diag(s)⁻¹`: the folded block, without writing it. Ratio 0 leaves
    the block as it is, so the choice is never worse than rounding to nearest by the measure used.
    """
    names = [name for consumer in group.consumers if (name := f"{consumer}.weight") not in block.untouched]
    best: tuple[float, float, Tensor] | None = None
    for step in range(ratios):
        scale = candidate_scale(block, group, statistics, step / ratios)
        wide = spread(scale, len(statistics.mean_abs), block.head_dim)
        rounded = {name: rounded_weight(block.weights[name] * wide, quant.of(name)) / wide for name in names}
        error = judge(block.weights, rounded)
        if best is None or error < best[0]:
            best = (error, step / ratios, scale)
    assert best is not None
    return best[1], best[2]


def search_clip(w: Tensor, gram: Tensor, fmt: WeightFormat, steps: int, shrink: float) -> Tensor:
    """Return `w (out, in)` with each group clamped to the range that rounds with the least output error.

    The ranges tried are `±(1 - shrink · k / steps) · max|w|` for `k = 0 … steps - 1`; each group of each output
    channel takes its own.
    """
    groups = fmt.grouped(w)
    limit = groups.abs().amax(-1, keepdim=True)

    def clamped(bound: Tensor) -> Tensor:
        return groups.clamp(-bound, bound).reshape(w.shape)

    candidates = [limit * (1 - shrink * step / steps) for step in range(steps)]
    return clamped(_least_error(w, gram, fmt, candidates, lambda bound: rounded_weight(clamped(bound), fmt)))


def search_range(
    w: Tensor, gram: Tensor, fmt: WeightFormat, widest: float, steps: int, shrink: float, apart: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the factors of each group's least and largest, `(out, groups, 1)`, whose grid rounds with little error.

    The factors tried are `(1 - shrink · k / steps) · widest` for `k = 0 … steps - 1`, the same at both ends. With
    `apart` the lower end is then tried alone, and the upper one after it: no group's output error rises by that.
    """
    lo, hi = fmt.extremes(w)
    factors = [torch.full_like(lo, widest * (1 - shrink * step / steps)) for step in range(steps)]

    def rounded(low: Tensor, high: Tensor) -> Tensor:
        return fmt.fake(w, *fmt.fit(lo * low, hi * high))

    both = _least_error(w, gram, fmt, factors, lambda factor: rounded(factor, factor))
    if not apart:
        return both, both
    low = _least_error(w, gram, fmt, [both, *factors], lambda factor: rounded(factor, both))
    return low, _least_error(w, gram, fmt, [both, *factors], lambda factor: rounded(low, factor))


def _least_error(
    w: Tensor, gram: Tensor, fmt: WeightFormat, candidates: Sequence[Tensor], rounded: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return, for each group, the candidate `(out, groups, 1)` whose rounding of `w` costs the least output error.

    A group is judged by its own contribution `δ X_g`, that is by `δᵀ (X_gᵀ X_g) δ`; of equals the first is taken.
    """
    count, size = fmt.grouped(w).shape[1:]
    blocks = gram.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (count, size, size)
    least = torch.full_like(candidates[0], torch.inf)
    best = candidates[0]
    for candidate in candidates:
        difference = fmt.grouped(rounded(candidate) - w)
        weighted = torch.einsum("ogi,gij->ogj", difference, blocks)
        error = (weighted * difference).sum(-1, keepdim=True)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, candidate, best)
    return best


def rounded_weight(w: Tensor, fmt: WeightFormat) -> Tensor:
    """Return `w (out, in)` on the grid that spans each group."""
    return fmt.fake(w, *fmt.fit(*fmt.extremes(w)))
