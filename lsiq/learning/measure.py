"""How far outputs are from their targets: the mean squared error, relative to the level of what it falls on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lsiq.runtime import processes, streams

if TYPE_CHECKING:
    from lsiq.learning.schedule import RelativeTo

# Below it a level counts as that much, so that nothing is divided by 0.
LEAST = 1e-12
# How many times as loud as the mean token a token's mean square must be for `loud` to halve its weight.
LOUD = 10


@dataclass(frozen=True)
class Measure:
    """A mean squared error over a level.

    Attributes:
        power: `()`, by which the mean is divided.
        channels: `(d,)`, weights of the channels; None for equal ones.
        tokens: `()`, which added to the mean square of a token's target divides its error; None for equal tokens.
    """

    power: Tensor
    channels: Tensor | None = None
    tokens: Tensor | None = None

    def mean(self, out: Tensor, target: Tensor, compile_it: bool = False) -> Tensor:
        """Return the mean weighted squared difference of two `(batch, T, d)`, not divided by `power` yet."""
        if compile_it:
            from lsiq.kernels.compiled import compiled

            function = compiled(mean_square, ("mean_square", self.channels is None, self.tokens is None))
            return function(out, target, self.channels, self.tokens)
        return mean_square(out, target, self.channels, self.tokens)


def mean_square(out: Tensor, target: Tensor, channels: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
    """Return `mean(channels · (out - target)²)`, of each token's over `tokens` and its target's level; in float32."""
    target = target.float()
    error = (out.float() - target).square()
    if channels is not None:
        error = error * channels
    return (error if tokens is None else error / (_level(target) + tokens)).mean()


def measure(target: Tensor, relative_to: RelativeTo, samples: int, device: torch.device) -> Measure:
    """Return what errors of outputs that should be `target (N, T, d)` count relative to.

    - stream: the mean square of all of it.
    - loud: token `t` weighs `1 / (p_t + LOUD · m²)`, where `p_t` is its mean square and `m` the mean of all tokens'
      root mean squares. So tokens count alike but for one that is far louder than the others, as the first often is
      (massive activations, arXiv 2402.17762).
    - channel: channel `c` weighs `1 / (v_c + mean v)`, where `v_c` is the square of its mean magnitude, in which a few
      loud tokens count less than in a mean square. So a channel much louder than the others counts as they do.
    - token: the mean square of each token.
    - both: that, and the channels' levels in tokens that are divided by their root mean square.

    But for `stream` an error as large as the target itself comes to 1, whatever the weights.

    Args:
        samples: sequences of all processes, of which this one has `N`.
        device: where errors are found.
    """
    if relative_to == "token":
        return Measure(torch.ones((), device=device), tokens=torch.zeros((), device=device))
    square = torch.zeros(target.shape[-1], dtype=torch.float64, device=target.device)
    magnitude = torch.zeros_like(square)
    power = square.new_zeros(())
    levels = square.new_zeros(target.shape[:2])
    # Sequence by sequence: a stream may be as large as the host's memory.
    for index, sequence in enumerate(target):
        t = sequence.float()
        if relative_to == "stream":
            power += t.square().mean()
        elif relative_to == "loud":
            levels[index] = _level(t).squeeze(-1)
        else:
            t = t / _level(t).sqrt() if relative_to == "both" else t
            square += t.square().mean(0)
            magnitude += t.abs().mean(0)
        streams.release(target)
    if relative_to == "stream":
        return Measure((processes.add(power).float() / samples).clamp(min=LEAST).to(device))
    if relative_to == "loud":
        quiet = LOUD * (processes.add(levels.sqrt().mean(1).sum()) / samples).square()
        power = processes.add((levels / (levels + quiet)).mean(1).sum()) / samples
        return Measure(power.float().to(device), tokens=quiet.float().to(device))
    square, magnitude = processes.add(square) / samples, processes.add(magnitude) / samples
    level = magnitude.square().clamp(min=LEAST)
    channels = 1 / (level + level.mean())
    tokens = torch.zeros((), device=device) if relative_to == "both" else None
    return Measure((channels * square).mean().float().to(device), channels.float().to(device), tokens)


def _level(token: Tensor) -> Tensor:
    """Return the mean squares `(…, T, 1)` of tokens `(…, T, d)`."""
    return token.square().mean(-1, keepdim=True).clamp(min=LEAST)
