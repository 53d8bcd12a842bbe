"""Perplexity by the published protocol, and what is compared with the float model token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsiq.errors import NumericalError
from lsiq.evals.block_pass import FunctionOf, run_blocks
from lsiq.models.loading import Model

# Tokens, and logits (256 MiB in float32), that are held at once for each model.
_TOKENS, _LOGITS = 2048, 2**26


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


@dataclass(frozen=True)
class TokenScores:
    """What one model says of every predicted token of some windows.

    Attributes:
        losses: `(N, T - 1)`, negative log likelihood in nats.
        divergence: `(N, T - 1)`, Kullback-Leibler divergence from the reference model's prediction, in nats; None
            where there is no reference.
        agrees: `(N, T - 1)`, whether both give the same token the highest probability.
    """

    losses: Tensor
    divergence: Tensor | None = None
    agrees: Tensor | None = None

    def perplexity(self) -> Perplexity:
        """Return the perplexity; NumericalError where the loss is not finite."""
        loss = self.losses.double().mean().item()
        if not math.isfinite(loss):
            raise NumericalError(f"the loss of the model is {loss}; try model.dtype=float32 or model.dtype=bfloat16")
        value = math.exp(loss) if loss < 700 else math.inf
        return Perplexity(value, loss, self.losses.numel(), len(self.losses))


@torch.no_grad()
def perplexity(
    model: Model, windows: Tensor, batch: int, function_of: FunctionOf, advance: Callable[[], None]
) -> Perplexity:
    """Measure, on `windows (N, T)` of token ids, the model whose blocks `function_of` makes of the float ones.

    Each window is read on its own; its first token is context only, the others are predicted. The loss is averaged
    over all predicted tokens and exponentiated. `advance` is called after each block.

    Source: the protocol of GPTQ and OmniQuant.

    Raises:
        NumericalError: the loss is not finite.
    """
    batches = windows.split(batch)
    streams = run_blocks(model, {"": batches}, {"": function_of}, advance)
    return score_tokens(model, batches, streams)[""].perplexity()


@torch.no_grad()
def score_tokens(
    model: Model,
    batches: Sequence[Tensor],
    streams: Mapping[str, Sequence[Tensor]],
    reference: str | None = None,
    heads: Mapping[str, Model] | None = None,
) -> dict[str, TokenScores]:
    """Return what each model says of the tokens in `batches (B, T)`.

    Args:
        streams: by model, what left its last block: one `(B, T, d)` for each batch.
        reference: the model that the others are compared with; None leaves divergence and agreement out.
        heads: models whose head makes the logits in place of that of `model`, by name.
    """
    models = {name: (heads or {}).get(name, model) for name in streams}
    parts: dict[str, list[list[Tensor]]] = {name: [] for name in streams}
    for position, ids in enumerate(batches):
        scores = _score_batch(models, ids, {name: stream[position] for name, stream in streams.items()}, reference)
        for name, columns in scores.items():
            parts[name].append([column.view(len(ids), -1).cpu() for column in columns])
    return {
        name: TokenScores(*(torch.cat(column) for column in zip(*rows, strict=True))) for name, rows in parts.items()
    }


def _score_batch(
    models: Mapping[str, Model], ids: Tensor, states: Mapping[str, Tensor], reference: str | None
) -> dict[str, list[Tensor]]:
    """Return by model the columns of TokenScores, flat; the logits of few tokens are held at once."""
    model = next(iter(models.values()))
    targets = ids[:, 1:].flatten().to(model.device)
    flat = {name: hidden[:, :-1].flatten(0, 1) for name, hidden in states.items()}
    at_once = max(1, min(_TOKENS, _LOGITS // model.config.vocab_size))
    parts: dict[str, list[list[Tensor]]] = {name: [] for name in states}
    for start in range(0, len(targets), at_once):
        part = slice(start, start + at_once)
        expected = None if reference is None else models[reference].logits(flat[reference][part]).log_softmax(-1)
        for name, hidden in flat.items():
            if name == reference and expected is not None:
                parts[name].append([-expected.gather(1, targets[part, None]).squeeze(1)])
            else:
                parts[name].append(_score(models[name].logits(hidden[part]), targets[part], expected))
    return {name: [torch.cat(column) for column in zip(*rows, strict=True)] for name, rows in parts.items()}


def _score(logits: Tensor, targets: Tensor, expected: Tensor | None) -> list[Tensor]:
    if expected is None:
        return [torch.nn.functional.cross_entropy(logits, targets, reduction="none")]
    predicted = logits.log_softmax(-1)
    return [
        -predicted.gather(1, targets[:, None]).squeeze(1),
        torch.nn.functional.kl_div(predicted, expected, reduction="none", log_target=True).sum(-1),
        predicted.argmax(-1) == expected.argmax(-1),
    ]
