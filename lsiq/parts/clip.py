"""Clip (LWC): learnable clipping of each group's range."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.parts.base import Draft, PartState, PartTraits
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor

    from lsiq.formats.quant import QuantSettings
    from lsiq.models.block import Block
    from lsiq.models.context import Context


# The search tries every range down to half of the widest, as AWQ's does.
SEARCH_STEPS = 20
SEARCH_SHRINK = 0.5


@settings
class Clip(PartTraits):
    """Learnable weight clipping: the grid of a group spans `β · min … γ · max`.

    With `form=sigmoid` the factors are `β = σ(l)`, `γ = σ(u)` and the logits are learned; with `form=linear` the
    factors themselves are, kept in 0 … 1. With `search` each group starts at the range whose rounding costs the least
    output error of its linear, among those down to half of the widest; with `ends=apart` the least and the largest
    weight are then scaled by factors of their own.

    With `span=present` the grid follows what other parts make of the weights; with `span=start` it is that of the
    weights that the part started on, so that only the factors move it.

    Source: OmniQuant (arXiv 2308.13137, equation 2) for the sigmoid; its code starts both logits at 4.0, which clips
    by 1.8 %, and learns them at rate 1e-2 (its text swaps the two rates). AutoRound (arXiv 2309.05516, equation 3) for
    the linear form, with signed-gradient steps. AWQ (arXiv 2306.00978) for the search, which clips both ends alike;
    `ends=apart` is this package's own.
    """

    lr: float | None = Field(
        gt=0, description="learning rate of logits or factors, above 0; null: 1 / steps, of 16 at least"
    )
    start_logit: float | None = Field(
        4.0,
        gt=-20,
        lt=20,
        description="logit of the factor that both ends start from, -20 to 20; null (form=linear only) starts at 1",
    )
    form: Literal["sigmoid", "linear"] = Field("sigmoid", description="sigmoid or linear: what is learned")
    search: bool = Field(False, description="true starts each group at the range with the least output error")
    ends: Literal["together", "apart"] = Field(
        "together",
        description="of the search: together (one factor for both ends of a range), or apart (each by its own)",
    )
    span: Literal["present", "start"] = Field(
        "present",
        description="whose extremes the factors scale: present (the changed weights'), or start (as they were)",
    )

    def __post_init__(self) -> None:
        if self.start_logit is None and self.form == "sigmoid":
            raise ValueError("start_logit=null: no logit stands for the full range; set form=linear or start_logit=4")
        if self.ends == "apart" and not self.search:
            raise ValueError("ends=apart: nothing is searched; set search=true, or ends=together")

    @property
    def name(self) -> str:
        return "clip"

    def start(self, block: Block, quant: QuantSettings, context: Context) -> PartState:
        ends: dict[str, Tensor] = {}
        constants: dict[str, Tensor] = {}
        for name in block.linears:
            lo, hi = quant.of(name).extremes(block.weights[name])
            if self.span == "start":
                constants |= {f"{name}:least": lo, f"{name}:largest": hi}
            full = lo.new_full(lo.shape, self._widest)
            ends |= {f"{name}:low": full, f"{name}:high": full.clone()}
        if self.search:
            ends |= self._searched(block, quant, context)
        if self.form == "linear":
            return PartState(ends, constants, bounds=dict.fromkeys(ends, (0.0, 1.0)))
        if self.search or self.start_logit is None:
            return PartState({key: end.logit() for key, end in ends.items()}, constants)
        return PartState({key: end.new_full(end.shape, self.start_logit) for key, end in ends.items()}, constants)

    def apply(self, draft: Draft, state: PartState, block: Block) -> Draft:
        p = state.parameters
        ends = p if self.form == "linear" else {key: logit.sigmoid() for key, logit in p.items()}
        clip = {name: (ends[f"{name}:low"], ends[f"{name}:high"]) for name in block.linears}
        c = state.constants
        extremes = {name: (c[f"{name}:least"], c[f"{name}:largest"]) for name in block.linears} if c else {}
        return replace(draft, clip=clip, extremes=extremes)

    @property
    def _widest(self) -> float:
        return 1.0 if self.start_logit is None else 1 / (1 + math.exp(-self.start_logit))

    def _searched(self, block: Block, quant: QuantSettings, context: Context) -> dict[str, Tensor]:
        """The factors with the least output error, by parameter; linears of one stage share inputs."""
        from lsiq.calib.gram import input_grams
        from lsiq.calib.scale_search import search_range

        assert context.inputs is not None  # the method asks for them
        first = [stage[0] for stage in block.spec.stages]
        grams = input_grams(block, {}, context.inputs, context.batch, first, quant.running)
        ends: dict[str, Tensor] = {}
        for stage in block.spec.stages:
            gram = grams[stage[0]].to(block.weights[f"{stage[0]}.weight"].dtype)
            for name in (f"{linear}.weight" for linear in stage):
                if name in block.untouched or (fmt := quant.of(name)).bits == 16:
                    continue
                apart = self.ends == "apart"
                low, high = search_range(
                    block.weights[name], gram, fmt, self._widest, SEARCH_STEPS, SEARCH_SHRINK, apart
                )
                ends |= {f"{name}:low": low, f"{name}:high": high.clone()}
        return ends
