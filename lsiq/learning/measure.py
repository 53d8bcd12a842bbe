"""How far outputs are from their targets: the mean squared error, relative to the level of what it falls on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lsiq.runtime import processes, streams

if TYPE_CHECKING:
    from lsiq.learning.schedule import RelativeTo

# Below it a level counts as that much, so that nothing is divided by 0.
LEAST = 1e-12


@dataclass(frozen=True)
class Measure:
    """A mean squared error over a level.

    Attributes:
        power: `()`, by which the mean is divided.
        channels: `(d,)`, weights of the channels; None for equal ones.
        tokens: whether each token's error is divided by the mean square of its target.
    """

    power: Tensor
    channels: Tensor | None = None
    tokens: bool = False

    def mean(self, out: Tensor, target: Tensor, compile_it: bool = False) -> Tensor:
        """Return the mean weighted squared difference of two `(batch, T, d)`, not divided by `power` yet."""
        function = partial(mean_square, tokens=self.tokens)
        if compile_it:
            from lsiq.kernels.compiled import compiled

            function = compiled(function, ("mean_square", self.tokens))
        return function(out, target) if self.channels is None else function(out, target, self.channels)


def mean_square(out: Tensor, target: Tensor, channels: Tensor | None = None, tokens: bool = False) -> Tensor:
    """Return `mean(channels · (out - target)²)`, with `tokens` of each token's over its target's level; in float32."""
    target = target.float()
    error = (out.float() - target).square()
    if channels is not None:
        error = error * channels
    return (error / _level(target) if tokens else error).mean()


def measure(target: Tensor, relative_to: RelativeTo, samples: int, device: torch.device) -> Measure:
    """Return what errors of outputs that should be `target (N, T, d)` count relative to.

    - stream: the mean square of all of it.
    - channel: channel `c` weighs `1 / (v_c + mean v)`, where `v_c` is the square of its mean magnitude, in which a few
      loud tokens count less than in a mean square. So a channel much louder than the others counts as they do.
    - token: the mean square of each token.
    - both: that, and the channels' levels in tokens that are divided by their root mean square.

    But for `stream` an error as large as the target itself comes to 1, whatever the weights.

    Args:
        samples: sequences of all processes, of which this one has `N`.
        device: where errors are found.
    """
    by_token = relative_to in ("token", "both")
    if relative_to == "token":
        return Measure(torch.ones((), device=device), tokens=True)
    square = torch.zeros(target.shape[-1], dtype=torch.float64, device=target.device)
    magnitude = torch.zeros_like(square)
    power = square.new_zeros(())
    # Sequence by sequence: a stream may be as large as the host's memory.
    for sequence in target:
        t = sequence.float()
        if relative_to == "stream":
            power += t.square().mean()
        else:
            t = t / _level(t).sqrt() if by_token else t
            square += t.square().mean(0)
            magnitude += t.abs().mean(0)
        streams.release(target)
    if relative_to == "stream":
        return Measure((processes.add(power).float() / samples).clamp(min=LEAST).to(device))
    square, magnitude = processes.add(square) / samples, processes.add(magnitude) / samples
    level = magnitude.square().clamp(min=LEAST)
    channels = 1 / (level + level.mean())
    return Measure((channels * square).mean().float().to(device), channels.float().to(device), by_token)


def _level(token: Tensor) -> Tensor:
    """Return the mean squares `(…, T, 1)` of tokens `(…, T, d)`."""
    return token.square().mean(-1, keepdim=True).clamp(min=LEAST)
