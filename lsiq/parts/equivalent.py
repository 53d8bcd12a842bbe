"""Equivalent (LET): learnable scales and shifts between linears and what feeds them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.errors import InputError
from lsiq.models.folding import channels_of, fold_scale, fold_shift, gather
from lsiq.models.spec import Group
from lsiq.parts.base import Draft, PartState, PartTraits
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor

    from lsiq.formats.quant import QuantSettings
    from lsiq.models.block import Block
    from lsiq.models.context import Context


Pair = Literal["norm", "value", "query_key"]
SEARCH_RATIOS = 20  # exponents tried, as AWQ does


@settings
class Equivalent(PartTraits):
    """Learnable equivalent transformation: `x → (x - δ) / s` in the producer, `W → W diag(s)`, `b → b + W δ`.

    Pairs: norm → (q, k, v), norm → (fc1 | gate, up), value → output projection, query ↔ key. The last linear of the
    feed-forward part has no partner. All are exact in float: a value scale is shared by the query heads that read the
    value head, and under a rotary embedding the two channels of a rotated pair share their query-key scale. Queries and
    keys that are normalised after their projections, or that one fused matrix writes, have none.

    The scale starts at `max|x|^α / max|W|^(1-α)`, the query-key scale at 1, the shift at the middle of the range. With
    `search` it starts at AWQ's instead: `mean|x|^r / sqrt(max · min)` with the exponent `r` whose scale rounds the
    weights with the least output error. That search looks at weights only: neither the rounding of activations nor
    shifts are part of it.

    With `unit=step` the rate counts in steps of a grid of the weights' width `b` over a range of 1, `1 / (2^b - 1)`: a
    scale that moves by one step moves a weight as large as its grid's range by one step of it. Where the
    linears of a block have several widths the narrowest counts.

    Source: OmniQuant (arXiv 2308.13137, section 3.3); AWQ (arXiv 2306.00978, equations 4 and 5) for the search.
    Deviations: the logarithm of the scale is learned, so that it stays positive without clamping; and the value pair is
    folded as the linear pair it is, where OmniQuant's public code trains another function than it stores on OPT.
    """

    keeps_function = True

    lr: float = Field(5e-3, gt=0, description="learning rate of log-scales and shifts, above 0")
    unit: Literal["value", "step"] = Field(
        "value", description="what the rate counts in: value, or step (of the weights' grid)"
    )
    alpha: float = Field(
        0.5, ge=0, le=1, description="how much of the range moves into the weights, 0 to 1; for search=false"
    )
    search: bool = Field(False, description="true starts the scales at those with the least output error")
    pairs: list[Pair] = Field(["norm", "value", "query_key"], description="a list of norm, value and query_key")
    shift: Literal["auto", "always", "never"] = Field(
        "auto", description="auto (where there are biases and activations are quantised), always or never"
    )
    start_from: Literal["all", "first"] = Field(
        "all", description="all consumers' weights or only the first one's, for the starting scale"
    )
    weight_only_families: list[str] | None = Field(
        description="model types that take this part when activations stay in float; null means all"
    )
    only_with_shifts: bool = Field(
        False, description="true leaves out blocks whose norms take no shift, such as LLaMA's, which have no biases"
    )

    @property
    def name(self) -> str:
        return "equivalent"

    def start(self, block: Block, quant: QuantSettings, context: Context) -> PartState:
        from lsiq.calib.input_statistics import extremes

        if not self._applies(block, quant):
            return PartState({})
        if block.unfoldable:
            raise InputError(f"method: the part equivalent folds scales into norms, but {block.unfoldable}")
        assert context.inputs is not None  # the method asks for them
        ranges = extremes(block, context.inputs, context.batch)
        searched = self._search(block, quant, context) if self.search else {}
        parameters: dict[str, Tensor] = {}
        for group in self._groups(block):
            key = group.producer
            width = block.weights[f"{group.consumers[0]}.weight"].shape[1]
            channels = channels_of(block.weights, group)
            lo, hi = (gather(side, channels, block.head_dim) for side in _signed(ranges[group.consumers[0]], width))
            shift = (hi - lo) / 2 if self._shifts(group, block, quant) else None
            if shift is not None:
                parameters[f"{key}:shift"] = shift
            reach = hi.maximum(lo) if shift is None else (hi + lo) / 2
            consumers = group.consumers if self.start_from == "all" else group.consumers[:1]
            scale = searched[key] if self.search else smoothing_scale(block, consumers, reach, self.alpha)
            parameters[f"{key}:log_scale"] = scale.log()
        if "query_key" in self.pairs and not _fixed_queries(block):
            keys = block.weights[f"{block.spec.key}.weight"]
            pairs = 2 if "position_embeddings" in block.kwargs else 1
            parameters["query_key:log_scale"] = keys.new_zeros(keys.shape[0] // block.head_dim, block.head_dim // pairs)
        if self.unit == "value":
            return PartState(parameters)
        return PartState(parameters, unit=1 / (2 ** min(quant.of(name).bits for name in block.linears) - 1))

    def apply(self, draft: Draft, state: PartState, block: Block) -> Draft:
        weights = dict(draft.weights)
        for group in self._groups(block):
            if (shift := state.parameters.get(f"{group.producer}:shift")) is not None:
                weights |= fold_shift(weights, group, shift, block.head_dim)
            if (log_scale := state.parameters.get(f"{group.producer}:log_scale")) is not None:
                weights |= fold_scale(weights, group, log_scale.exp(), block.head_dim)
        if (log_scale := state.parameters.get("query_key:log_scale")) is not None:
            weights |= _fold_query_key(weights, block, log_scale.exp())
        return replace(draft, weights=weights)

    def _search(self, block: Block, quant: QuantSettings, context: Context) -> dict[str, Tensor]:
        """The scales `(channels,)` with the least output error, by producer."""
        from lsiq.calib.scale_search import LinearError, observe_inputs, search_scale

        assert context.inputs is not None
        statistics = observe_inputs(block, context.inputs, context.batch)
        scales = {}
        for group in self._groups(block):
            statistic = statistics[group.consumers[0]]
            judge = LinearError(statistic.gram)
            scales[group.producer] = search_scale(block, group, statistic, quant, SEARCH_RATIOS, judge)[1]
        return scales

    def _applies(self, block: Block, quant: QuantSettings) -> bool:
        if self.only_with_shifts and not any(
            self._shifts(group, block, quant) for group in self._groups(block) if group.kind == "norm"
        ):
            return False
        families = self.weight_only_families
        return quant.activation.active or families is None or block.spec.model_type in families

    def _groups(self, block: Block) -> Iterator[Group]:
        return (group for group in block.groups if group.kind in self.pairs)

    def _shifts(self, group: Group, block: Block, quant: QuantSettings) -> bool:
        biases = all(f"{name}.bias" in block.weights for name in (group.producer, *group.consumers))
        enabled = self.shift == "always" or (self.shift == "auto" and quant.activation.active)
        return enabled and biases


def smoothing_scale(block: Block, consumers: Sequence[str], reach: Tensor, alpha: float) -> Tensor:
    """Return `max|x|^α / max|W|^(1-α)` per channel; 1 for channels that are dead on either side.

    Args:
        consumers: the linears whose weights count, by name; the maximum is taken over all of them.
        reach: `(channels,)`, the largest |x| of each channel of their producer.

    Source: SmoothQuant (arXiv 2211.10438, equation 4).
    """
    columns = functools.reduce(
        lambda a, b: a.maximum(b), (block.weights[f"{name}.weight"].abs().amax(0) for name in consumers)
    )
    weights = gather(columns, len(reach), block.head_dim)
    scale = reach.clamp(min=1e-5) ** alpha / weights.clamp(min=1e-5) ** (1 - alpha)
    dead = (reach < 1e-5) | (weights < 1e-5)
    return scale.clamp(1e-4, 1e4).masked_fill(dead, 1.0)


def _signed(ranges: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """How far the inputs reach below and above zero, `(-lo, hi)`, each `(width,)`."""
    assert ranges.shape == (2, width)
    return -ranges[0], ranges[1]


def _fixed_queries(block: Block) -> bool:
    """Whether queries and keys take no scale: a norm after their projections undoes it, or one matrix writes both."""
    return block.spec.query == block.spec.key or any("q_norm" in name for name in block.weights)


def _fold_query_key(weights: dict[str, Tensor], block: Block, scale: Tensor) -> dict[str, Tensor]:
    """Divide queries and multiply keys by `scale (key heads, head_dim or half of it)`; their products stay the same."""
    if scale.shape[1] < block.head_dim:
        scale = scale.repeat(1, 2)  # rotate_half pairs channel i with i + head_dim / 2
    changed: dict[str, Tensor] = {}
    for name, per_head in ((block.spec.query, 1 / scale), (block.spec.key, scale)):
        weight = weights[f"{name}.weight"]
        heads = weight.shape[0] // block.head_dim
        rows = per_head.repeat_interleave(heads // scale.shape[0], 0).flatten()
        changed[f"{name}.weight"] = weight * rows[:, None]
        if (bias := weights.get(f"{name}.bias")) is not None:
            changed[f"{name}.bias"] = bias * rows
    return changed
