"""Which of the equal ways a block's weights are made and its tokens are run while it is trained."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from lsiq.errors import ConfigError

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings
    from lsiq.learning.schedule import Training
    from lsiq.models.block import Block
    from lsiq.parts.base import Part, PartState


WeightPath = Literal["triton", "compile", "plain"]

# Tokens of blocks with fewer weights are passed before a compiler is done with them.
LARGE = 10_000_000
# Weights of smaller blocks are made in less time than kernels take to compile.
SMALLEST = 1_000_000


def choose(
    training: Training, parts: Sequence[Part], states: Sequence[PartState], block: Block, quant: QuantSettings
) -> WeightPath:
    """Return the path that `training.kernels` asks for.

    Raises:
        ConfigError: triton is asked for where its kernels cannot be used; the message says why.
    """
    kernels = training.kernels
    if kernels in ("plain", "compile"):
        return kernels
    if not _wants_kernels(kernels, block):
        return "plain"
    reason = _why_not_triton(parts, states, block, quant)
    if reason is None:
        return "triton"
    if kernels == "triton":
        raise ConfigError(f"method.training.kernels=triton: {reason}; use kernels=auto, compile or plain")
    return "plain"


def on_path(block: Block, path: WeightPath, training: Training) -> Block:
    """Return the block as it runs its tokens while its weights are made in this way."""
    return replace(block, compiled=compiles(path, block), fused_rounding=fuses_rounding(training.kernels, block))


def compiles(path: WeightPath, block: Block) -> bool:
    """Whether the block's tokens run compiled beside weights of this path; not beside interpreted kernels."""
    return path == "compile" or (path == "triton" and _on_gpu(block) and _size(block) >= LARGE)


def fuses_rounding(kernels: str, block: Block) -> bool:
    """Whether a kernel rounds the block's activations.

    Written out, rounding and its gradient are 37 passes over the tokens at each of seven places in a block.
    """
    return _wants_kernels(kernels, block) and _why_no_kernels(block) is None


def _wants_kernels(kernels: str, block: Block) -> bool:
    return kernels == "triton" or (kernels == "auto" and _on_gpu(block) and _size(block) >= SMALLEST)


def _on_gpu(block: Block) -> bool:
    return block.weights[block.linears[0]].is_cuda


def _size(block: Block) -> int:
    return sum(block.weights[name].numel() for name in block.linears)


def _why_not_triton(
    parts: Sequence[Part], states: Sequence[PartState], block: Block, quant: QuantSettings
) -> str | None:
    if (reason := _why_no_kernels(block)) is not None:
        return reason
    from lsiq.learning.fused_weights import uncovered

    reason = uncovered(parts, states, block, quant)
    return None if reason is None else f"the kernels do not cover this setting: {reason}"


def _why_no_kernels(block: Block) -> str | None:
    """Why no kernel runs where the block lies, or None where they do."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not _on_gpu(block) and os.environ.get("TRITON_INTERPRET") != "1":
        return "the kernels run on a GPU"
    return None
