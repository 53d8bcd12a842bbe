"""Tokens with giant activations, which attract attention and stretch every activation format."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from lsiq.calib.input_statistics import visit_inputs
from lsiq.models.block import run_stream
from lsiq.models.loading import Model
from lsiq.runtime import processes


@torch.no_grad()
def outlier_tokens(model: Model, tokens: Tensor, batch: int, threshold: float) -> list[int]:
    """Return ids of outlier tokens, the most frequent first: as many as a sequence has on average, rounded up.

    A token is one where the largest |input| of a block's last linear is above `threshold` times the median over all
    tokens. The first of each sequence is left out.

    Args:
        tokens: `(N, T)` token ids.
    """
    hidden, kwargs = model.embed(tokens[processes.share(len(tokens))], batch)
    giant = torch.zeros(tokens.shape, dtype=torch.bool)
    for index in range(model.depth):
        block = model.block(index, kwargs)
        sizes: list[Tensor] = []
        _, last = block.spec.writers
        visit_inputs(
            block, {}, hidden, batch, [last], lambda _, x, sizes=sizes: sizes.append(x.abs().amax(1).float().cpu())
        )
        size = torch.cat(processes.gather(torch.cat(sizes))).view(tokens.shape)
        giant |= size > threshold * size.median()
        hidden = run_stream(block.with_weights({}), hidden, batch, model.device)
    giant[:, 0] = False
    count = -(-int(giant.sum()) // len(tokens))
    return [token for token, _ in Counter(tokens[giant].tolist()).most_common(count)]
