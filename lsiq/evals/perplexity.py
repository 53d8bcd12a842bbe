"""Perplexity by the published protocol, streamed block by block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsiq.errors import NumericalError
from lsiq.models.block import Block, BlockFunction, run_stream
from lsiq.models.loading import Model

# Tokens whose logits are held at once: 2048 × 128k pieces × 4 bytes is 1 GiB.
_LOGIT_TOKENS = 2048


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on.

    Attributes:
        value: exp of the mean loss.
        loss: mean negative log likelihood per predicted token, in nats.
        tokens: how many tokens were predicted: `windows · (seqlen - 1)`.
        windows: how many windows were read.
    """

    value: float
    loss: float
    tokens: int
    windows: int


@torch.no_grad()
def perplexity(
    model: Model,
    windows: Tensor,
    batch: int,
    function_of: Callable[[Block], BlockFunction],
    advance: Callable[[], None],
) -> Perplexity:
    """Measure, on `windows (N, T)` of token ids, the model whose blocks `function_of` makes of the float ones.

    Each window is read on its own; its first token is context only, the others are predicted. The loss is averaged
    over all predicted tokens and exponentiated. Only one block is on the device at a time; `advance` is called after
    each.

    Source: the protocol of GPTQ and OmniQuant.

    Raises:
        NumericalError: the loss is not finite.
    """
    hidden, kwargs = model.embed(windows, batch)
    for index in range(model.depth):
        hidden = run_stream(function_of(model.block(index, kwargs)), hidden, batch, model.device)
        advance()
    total = 0.0
    rows = max(1, _LOGIT_TOKENS // windows.shape[1])
    for part, ids in zip(hidden.split(rows), windows.split(rows), strict=True):
        logits = model.logits(part[:, :-1])
        targets = ids[:, 1:].to(logits.device)
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        total += losses.double().sum().item()
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    loss = total / tokens
    if not math.isfinite(loss):
        raise NumericalError(f"the loss of the model is {loss}; try model.dtype=float32 or model.dtype=bfloat16")
    value = math.exp(loss) if loss < 700 else math.inf
    return Perplexity(value, loss, tokens, windows.shape[0])
