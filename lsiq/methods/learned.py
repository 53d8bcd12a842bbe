"""Learned methods: LWC, LET, LSI and their kin are one learner with different parts."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from lsiq.learning.schedule import LookAhead, Training, TrainingSchedule
from lsiq.methods.base import Method, Traits, chain, quantize_prepared
from lsiq.models.context import Context, Need
from lsiq.models.result import BlockResult
from lsiq.parts.base import Part
from lsiq.parts.clip import Clip
from lsiq.settings import settings

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings
    from lsiq.learning.learner import Trajectory
    from lsiq.models.block import Block


# Files and records name these by `_target_` as they stand here.
Course = TrainingSchedule
__all__ = ["Course", "Learned", "LookAhead", "Training"]


def _listed(parts: Any) -> Any:
    return list(parts.values()) if isinstance(parts, Mapping) else parts


@settings
class Learned(Traits):
    """Train the parameters of some parts block by block, then round.

    The parts act in their order on the float weights of a block; the result is put on the grid. OmniQuant is
    `equivalent` and `clip`; LSI adds `singular` in front of them.

    With `then` that method rounds what was learned: the block with its transformations folded, its increments added
    and its weights clamped to their learned ranges, so that grids fitted to them are the learned ones. (The parts are
    trained through rounding to nearest all the same.)
    """

    label: str = Field(pattern=r"^[a-z0-9][a-z0-9.+-]*$", description="the method's name in records and tables")
    parts: Annotated[list[Any], BeforeValidator(_listed)] = Field(
        description="parts by name, or a list of them, in the order in which they act"
    )
    training: Training = Field(description="how the parts are trained")
    then: Method | None = Field(
        default=None,
        description="a method that rounds what was learned, such as gptq; null for the rounding it was learned in",
    )
    latents: bool = Field(
        default=False,
        description="true keeps where in its cell each weight stood before it was rounded, for a later stage",
    )

    def __post_init__(self) -> None:
        for part in self.parts:
            if not isinstance(part, Part):
                raise ValueError(f"parts: {part} is not a part; see the files of conf/method/")
        names = [part.name for part in self.parts]
        if len(set(names)) < len(names):
            raise ValueError(f"parts: {', '.join(names)} names one part twice; each may stand once")
        if len(hardened := [part.name for part in self.parts if part.hardening]) > 1:
            raise ValueError(
                f"parts: {' and '.join(hardened)} both have hardening; rounding sets in once, so leave it at 0 in one"
            )
        if hardened and self.training.seconds is not None:
            raise ValueError(
                f"training.seconds={self.training.seconds}: may end a block before the rounding of {hardened[0]} has "
                "set in; use training.epochs, or hardening=0"
            )
        if self.training.schedule == "staged" and not set(names) & set(self.training.late):
            raise ValueError(f"training.late={self.training.late}: the method has only {', '.join(names)}")
        if unknown := set(self.training.signed) - set(names):
            raise ValueError(
                f"training.signed={self.training.signed}: the method has no {', '.join(sorted(unknown))}; "
                f"it has {', '.join(names)}"
            )
        if self.then is not None:
            self._check_then(self.then)

    def _check_then(self, then: Method) -> None:
        if not then.rounds_only:
            raise ValueError(
                f"then: {then.name} does more than round what {self.label} learned; put it outside "
                f"(method={then.name} method@method.then=…), or use gptq"
            )
        if self.latents:
            raise ValueError(f"latents=true: {then.name} rounds to other codes than was learned; use then=null")
        if any(isinstance(part, Clip) and part.span == "start" for part in self.parts):
            raise ValueError(f"then: {then.name} fits its grids to the changed weights; use clip.span=present")
        if choosers := [part.name for part in self.parts if part.chooses_codes]:
            raise ValueError(
                f"then: the part {choosers[0]} chooses codes that {then.name} would choose anew; use then=null"
            )

    @property
    def name(self) -> str:
        return self.label if self.then is None else f"{self.label}+{self.then.name}"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"inputs", "targets"})

    def quantize_block(self, block: Block, quant: QuantSettings, context: Context) -> BlockResult:
        import torch

        from lsiq.learning.encode import latents_of, merge, prepared
        from lsiq.learning.learner import learn
        from lsiq.learning.trained import apply_parts
        from lsiq.learning.trajectory import trace

        parts = tuple(self.parts)
        learned = learn(parts, self.training, block, quant, context)
        running = self.training.in_precision(block, context.cache)  # which decides the precision of increment products
        with torch.no_grad():
            draft = apply_parts(parts, learned.states, running)
            rows = trace(parts, learned, running)
            # The codes stand for the weights that the parts which keep the float function make.
            folds = [(p, s) for p, s in zip(parts, learned.states, strict=True) if p.keeps_function]
            folded = apply_parts([p for p, _ in folds], [s for _, s in folds], running).weights
        reference = {name: folded[name] for name in block.linears}
        if self.then is None:
            result = replace(merge(draft, running, quant), reference=reference)
            if self.latents:
                result = replace(result, latents=latents_of(draft, result, quant))
        else:
            floats, linears = prepared(draft, running, quant)
            result = quantize_prepared(self.then, block, {**reference, **floats}, quant, context, linears)
        state = {
            f"{part.name}:{name}": tensor
            for part, part_state in zip(parts, learned.states, strict=True)
            for name, tensor in part_state.parameters.items()
            if name not in part_state.bulky
        }
        metrics = {**measured(learned), **result.metrics}
        return replace(result, metrics=metrics, state=state, trace=rows, kernels=learned.kernels)


def measured(learned: Trajectory) -> dict[str, float]:
    """Return the numbers of a block's training that its record keeps.

    With hardening the first loss is that of weights of which little is rounded yet.
    """
    metrics = {
        "steps": float(learned.steps),
        "retries": float(learned.retries),
        "weight_path_share": learned.weight_seconds / max(learned.seconds, 1e-9),
    }
    if learned.epochs:
        ends = [0.0, *(epoch.seconds for epoch in learned.epochs)]
        metrics |= {
            "loss_first": learned.epochs[0].loss,
            "loss_last": learned.epochs[-1].loss,
            # The median: the first epoch also pays for what is set up once.
            "epoch_seconds": statistics.median(end - begin for begin, end in itertools.pairwise(ends)),
        }
    return {**metrics, **learned.held}


def refuse_rounded_ahead(then: Method) -> None:
    """Raise ValueError for a loss that sees later blocks rounded, as it would see them without online rotations."""
    for method in chain(then):
        if isinstance(method, Learned) and (ahead := method.training.ahead).blocks and ahead.later != "float":
            raise ValueError(
                f"then: training.ahead.later={ahead.later} rounds later blocks whose inputs are not rotated yet; "
                "behind online rotations use later=float or blocks=0"
            )
