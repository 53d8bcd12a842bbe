"""Learned methods: LWC, LET, LSI and their kin are one learner with different parts."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lsiq.methods.base import BlockResult, Context, Method, Need, Traits, chain, quantize_prepared
from lsiq.parts.base import Part
from lsiq.parts.clip import Clip
from lsiq.settings import settings

if TYPE_CHECKING:
    from pathlib import Path

    from lsiq.config import QuantSettings
    from lsiq.learn import Learned as Trajectory
    from lsiq.models.block import Block


@settings
class Course:
    """How long and how fast something is trained."""

    epochs: int = Field(ge=0, description="passes over the calibration samples for each block, at least 0")
    batch: int = Field(ge=1, description="sequences per step, at least 1")
    decay: Literal["constant", "linear", "cosine"] = Field(
        description="the learning rates' course: constant, linear or cosine (both to 0)"
    )
    precision: Literal["auto", "model", "float32", "bfloat16", "float16"] = Field(
        "model",
        description="of the block while it is trained: auto (what the machine multiplies fastest; the record says what "
        "that was), model (the model's), float32, bfloat16 or float16",
    )

    def steps(self, samples: int) -> int:
        """Optimizer steps per block."""
        return max(1, self.epochs * math.ceil(samples / self.batch))

    def rate_factor(self, done: float) -> float:
        """What the learning rates are multiplied by when `done` (0 … 1) of the steps are behind."""
        if self.decay == "linear":
            return 1 - done
        return (1 + math.cos(math.pi * done)) / 2 if self.decay == "cosine" else 1.0

    def in_precision(self, block: Block, cache: Path | None = None) -> Block:
        """Return the block running in the precision it is trained in.

        Args:
            cache: the folder where a machine keeps what auto stands for on it.
        """
        import torch

        name = self.precision
        if name == "auto":
            from lsiq.precision import fastest

            name = fastest(next(iter(block.weights.values())).device, block.dtype, cache).chosen
        return block if name == "model" else block.in_dtype(getattr(torch, name))


@settings
class LookAhead:
    """How far the loss of a block looks past it: `Σ_j weights[j] · mean‖difference of the outputs of block l + j‖²`.

    Source: CL (arXiv 2407.15508), with two blocks and, by default, equal weights.
    """

    blocks: int = Field(0, ge=0, description="how many later blocks count, at least 0; fewer where the model ends")
    weights: list[float] | None = Field(None, description="one per block from the trained one on; null for equal ones")
    later: Literal["float", "rtn", "learned"] = Field(
        "float", description="float, rtn (rounded to nearest) or learned (trained along, and anew in their turn)"
    )

    def __post_init__(self) -> None:
        if self.weights is None:
            return
        if len(self.weights) != self.blocks + 1:
            raise ValueError(f"weights={self.weights}: blocks={self.blocks} needs {self.blocks + 1} of them, or null")
        if min(self.weights) < 0 or not any(self.weights):
            raise ValueError(f"weights={self.weights}: each must be 0 or more, and one of them more")

    def within(self, count: int) -> list[float]:
        """Return the weights of a window of `count` later blocks, which is all that follow.

        Where only weights of 0 are left the farthest block takes 1, so that every block has a loss.
        """
        left = (self.weights or [1.0] * (self.blocks + 1))[: count + 1]
        return left if any(left) else [*left[:-1], 1.0]


@settings
class Training(Course):
    """How the parts of a method are trained on a block, one learning rate per part."""

    schedule: Literal["joint", "staged"] = Field(
        "joint", description="joint, or staged: the parts named in late stand still for the first wait epochs"
    )
    late: list[str] = Field(
        ["singular", "expansion", "random"], description="names of the parts that a staged schedule starts late"
    )
    wait: int = Field(0, ge=0, description="epochs before the late parts of a staged schedule move")
    signed: list[str] = Field(
        [], description="names of the parts that take signed-gradient steps; the others take AdamW's"
    )
    ahead: LookAhead = Field(
        LookAhead(blocks=0, weights=None, later="float"), description="how far the loss looks past the block"
    )
    aug_loss: bool = Field(False, description="true adds the loss against the float block on the quantised stream")
    keep: Literal["last", "best"] = Field(
        "last", description="last iterate, or best by calibration loss after an epoch, start included"
    )
    retries: int = Field(3, ge=0, description="tries at half the rates after a loss that is not finite")
    seconds: float | None = Field(
        None, gt=0, description="stop a block after the epoch that passes this; null for none"
    )
    graphs: bool = Field(True, description="true records a step on a GPU as a CUDA graph and replays it")
    kernels: Literal["auto", "triton", "compile", "plain"] = Field(
        "auto",
        description="auto (triton for large blocks on a GPU where its kernels cover the method, else plain), triton, "
        "compile or plain: how the weights are made and the block is run while it is trained",
    )

    def __post_init__(self) -> None:
        if self.schedule == "joint" and self.wait:
            raise ValueError(f"wait={self.wait}: nothing waits in a joint schedule; set schedule=staged or wait=0")
        if self.schedule == "staged" and not 0 < self.wait < max(self.epochs, 1):
            raise ValueError(
                f"wait={self.wait}: a staged schedule needs 1 to epochs-1={self.epochs - 1} epochs to wait"
            )


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
        False, description="true keeps where in its cell each weight stood before it was rounded, for a later stage"
    )

    def __post_init__(self) -> None:
        for part in self.parts:
            if not isinstance(part, Part):
                raise ValueError(f"parts: {part} is not a part; see the files of conf/method/")
        names = [part.name for part in self.parts]
        if len(set(names)) < len(names):
            raise ValueError(f"parts: {', '.join(names)} names one part twice; each may stand once")
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
        if chosen := [part.name for part in self.parts if part.chooses_codes]:
            raise ValueError(
                f"then: the part {chosen[0]} chooses codes that {then.name} would choose anew; use then=null"
            )

    @property
    def name(self) -> str:
        return self.label if self.then is None else f"{self.label}+{self.then.name}"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"inputs", "targets"})

    def quantize_block(self, block: Block, quant: QuantSettings, context: Context) -> BlockResult:
        import torch

        from lsiq.learn import learn
        from lsiq.merge import latents_of, merge, prepared
        from lsiq.step import apply_parts
        from lsiq.trajectory import trace

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
            for part, held in zip(parts, learned.states, strict=True)
            for name, tensor in held.parameters.items()
            if name not in held.bulky
        }
        metrics = {**measured(learned), **result.metrics}
        return replace(result, metrics=metrics, state=state, trace=rows, kernels=learned.kernels)


def measured(learned: Trajectory) -> dict[str, float]:
    """Return the numbers of a block's training that its record keeps."""
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
    return metrics


def refuse_rounded_ahead(then: Method) -> None:
    """Raise ValueError for a loss that sees later blocks rounded, as it would see them without online rotations."""
    for method in chain(then):
        if isinstance(method, Learned) and (ahead := method.training.ahead).blocks and ahead.later != "float":
            raise ValueError(
                f"then: training.ahead.later={ahead.later} rounds later blocks whose inputs are not turned yet; "
                "behind online rotations use later=float or blocks=0"
            )
