"""How far a model's next tokens are from what they should be, in memory that does not grow with the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.checkpoint import checkpoint

# As many logits are made at once, 1 GiB of each kind in float32; those of small models are all made at once.
LOGITS = 2**28

Logits = Callable[[Tensor], Tensor]


def text_loss(logits_of: Logits, hidden: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    """Return the mean next-token loss, in nats, of what left the last block, `(n, T, d)`.

    Args:
        tokens: `(n, T)`, on any device.
        vocabulary: how many logits a token has.
    """
    targets = tokens[:, 1:].to(hidden.device).flatten()
    parts = _parts(hidden[:, :-1], vocabulary)
    if len(parts) == 1:
        return cross_entropy(logits_of(hidden[:, :-1]).flatten(0, 1), targets)

    def loss(states: Tensor, expected: Tensor) -> Tensor:
        return cross_entropy(logits_of(states).flatten(0, 1), expected, reduction="sum")

    sums = [_recomputed(loss, h, t) for h, t in zip(parts, targets.split(parts[0].shape[1]), strict=True)]
    return torch.stack(sums).sum() / len(targets)


def float_loss(logits_of: Logits, hidden: Tensor, reference: Tensor, vocabulary: int) -> Tensor:
    """Return the mean of `KL(float ‖ quantised)` over all tokens, in nats.

    Args:
        hidden, reference: `(n, T, d)`, what left the last block of the quantised and of the float model.
    """
    parts = _parts(hidden, vocabulary)
    if len(parts) == 1:
        return _divergence(logits_of, hidden, reference, "batchmean")

    def loss(states: Tensor, expected: Tensor) -> Tensor:
        return _divergence(logits_of, states, expected, "sum")

    sums = [_recomputed(loss, h, r) for h, r in zip(parts, _parts(reference, vocabulary), strict=True)]
    return torch.stack(sums).sum() / (hidden.shape[0] * hidden.shape[1])


def _divergence(logits_of: Logits, hidden: Tensor, reference: Tensor, reduction: str) -> Tensor:
    with torch.no_grad():
        expected = logits_of(reference).flatten(0, 1).log_softmax(-1)
    log_probabilities = logits_of(hidden).flatten(0, 1).log_softmax(-1)
    return kl_div(log_probabilities, expected, reduction=reduction, log_target=True)


def _parts(hidden: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    """Cut `(n, T, d)` into parts `(1, m, d)` whose logits may be there at once; one part is left as it is."""
    if hidden.shape[0] * hidden.shape[1] * vocabulary <= LOGITS:
        return (hidden,)
    return hidden.flatten(0, 1)[None].split(max(1, LOGITS // vocabulary), 1)


def _recomputed(loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, expected: Tensor) -> Tensor:
    """Return a loss whose logits are made again on the way back instead of being kept."""
    return checkpoint(loss, hidden, expected, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]
