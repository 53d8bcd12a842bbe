"""How long, how fast and how far ahead the parts of a learned method are trained."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.settings import settings

if TYPE_CHECKING:
    from pathlib import Path

    from lsiq.models.block import Block


# The share of the sequences that keep=held holds back where nobody says how many.
HELD = 0.125

# What an error of a block's outputs counts relative to; see `lsiq.learning.measure`.
RelativeTo = Literal["stream", "channel", "token", "both"]


@settings
class TrainingSchedule:
    """How long and how fast something is trained."""

    epochs: int = Field(ge=0, description="passes over the calibration samples for each block, at least 0")
    batch: int = Field(ge=1, description="sequences per step, at least 1")
    decay: Literal["constant", "linear", "cosine"] = Field(
        description="the learning rates' course: constant, linear or cosine (both to 0)"
    )
    precision: Literal["auto", "model", "float32", "tf32", "bfloat16", "float16"] = Field(
        description="of the block while it is trained: auto (what the machine multiplies fastest; the record says what "
        "that was), model (the model's), float32, tf32 (float32 whose products on a GPU are TF32; fine-tuning alone), "
        "bfloat16 or float16",
    )
    graphs: bool = Field(True, description="true records a step on a GPU as a CUDA graph and replays it")

    def held_back(self, samples: int) -> int:
        """Return how many of the sequences are never trained on.

        Raises:
            ValueError: there would be none of them, or none to train on.
        """
        del samples
        return 0

    def batches(self, samples: int) -> int:
        """Optimizer steps in one epoch."""
        return math.ceil((samples - self.held_back(samples)) / self.batch)

    def steps(self, samples: int) -> int:
        """Optimizer steps per block."""
        return max(1, self.epochs * self.batches(samples))

    def rate_factor(self, progress: float) -> float:
        """What the learning rates are multiplied by when `progress` (0 … 1) of the steps are behind."""
        if self.decay == "linear":
            return 1 - progress
        return (1 + math.cos(math.pi * progress)) / 2 if self.decay == "cosine" else 1.0

    def in_precision(self, block: Block, cache: Path | None = None) -> Block:
        """Return the block running in the precision it is trained in.

        Args:
            cache: the folder where a machine keeps what auto stands for on it.
        """
        import torch

        name = self.precision
        if name == "auto":
            from lsiq.runtime.precision import fastest

            name = fastest(block.device, block.dtype, cache).chosen
        return block if name == "model" else block.in_dtype(getattr(torch, "float32" if name == "tf32" else name))


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
        weights = (self.weights or [1.0] * (self.blocks + 1))[: count + 1]
        return weights if any(weights) else [*weights[:-1], 1.0]


@settings
class Training(TrainingSchedule):
    """How the parts of a method are trained on a block, one learning rate per part."""

    schedule: Literal["joint", "staged"] = Field(
        "joint", description="joint, or staged: the parts named in late stand still for the first wait epochs"
    )
    late: list[str] = Field(
        ["singular", "expansion", "random"], description="names of the parts that a staged schedule starts late"
    )
    wait: int = Field(0, ge=0, description="epochs before the late parts of a staged schedule move")
    signed: list[str] = Field(description="names of the parts that take signed-gradient steps; the others take AdamW's")
    ahead: LookAhead = Field(
        LookAhead(blocks=0, weights=None, later="float"), description="how far the loss looks past the block"
    )
    relative_to: RelativeTo = Field(
        "stream",
        description="what an error counts relative to: stream (the mean square of the block's outputs), channel (its "
        "channel's level, so that loud channels weigh less), token (its token's mean square), or both",
    )
    aug_loss: bool = Field(False, description="true adds the loss against the float block on the quantised stream")
    keep: Literal["last", "best", "held"] = Field(
        description="last iterate, or the best after an epoch, start included: best by calibration loss, held by the "
        "loss on sequences that are never trained on"
    )
    held: float | None = Field(
        None, gt=0, lt=1, description="share of the sequences that keep=held holds back; null: an eighth"
    )
    retries: int = Field(3, ge=0, description="tries at half the rates after a loss that is not finite")
    seconds: float | None = Field(
        None, gt=0, description="stop a block after the epoch that passes this; null for none"
    )
    kernels: Literal["auto", "triton", "compile", "plain"] = Field(
        "auto",
        description="auto (triton for large blocks on a GPU where its kernels cover the method, else plain), triton, "
        "compile or plain: how the weights are made and the block is run while it is trained",
    )

    def __post_init__(self) -> None:
        if self.precision == "tf32":
            raise ValueError("precision=tf32: is for fine-tuning through the whole model; use float32 or bfloat16")
        if self.held is not None and self.keep != "held":
            raise ValueError(f"held={self.held}: keep={self.keep} holds no sequences back; set keep=held or held=null")
        if self.schedule == "joint" and self.wait:
            raise ValueError(f"wait={self.wait}: nothing waits in a joint schedule; set schedule=staged or wait=0")
        if self.schedule == "staged" and not 0 < self.wait < max(self.epochs, 1):
            raise ValueError(
                f"wait={self.wait}: a staged schedule needs 1 to epochs-1={self.epochs - 1} epochs to wait"
            )

    def held_back(self, samples: int) -> int:
        if self.keep != "held":
            return 0
        return held_count(samples, self.held)


def held_count(samples: int, share: float | None) -> int:
    """Return how many of the sequences keep=held holds back: the share, or an eighth, to the nearest whole number.

    Raises:
        ValueError: there would be none of them, or none to train on.
    """
    share = HELD if share is None else share
    count = round(share * samples)
    if count < 1:
        raise ValueError(f"held={share}: is less than one of {samples} sequences; raise it or calib.samples")
    if count >= samples:
        raise ValueError(f"held={share}: leaves none of {samples} sequences to train on; lower it")
    return count
