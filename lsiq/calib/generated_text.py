"""Calibration text that the float model writes itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import StaticCache

from lsiq.models.entrance import CACHE
from lsiq.models.loading import Model
from lsiq.runtime.terminal import show_progress

# What keys and values may take while sequences are written side by side: on a CPU, and as a share of a GPU's free
# memory.
_CACHE_BYTES = 2**31
_CACHE_SHARE = 0.5


@torch.no_grad()
def write_sequences(model: Model, count: int, seqlen: int, seed: int) -> Tensor:
    """Return `(count, seqlen)` token ids drawn from the float model's own next-token distributions.

    Each sequence begins behind the token that begins documents, which it does not hold, or, where the tokenizer has
    none, behind a token drawn uniformly. Special tokens are not drawn. The whole model lies on its device meanwhile.
    The same seed gives the same tokens on the same kind of device.

    Source: LLM-QAT (arXiv 2305.17888, section 2.1), data from the model itself.
    Deviation: every token is drawn; there the first few are the likeliest ones.
    """
    name = model.spec.blocks
    weights = {
        f"{name}.{index}.{key}": weight.to(model.dtype)
        for index in range(model.depth)
        for key, weight in model.block(index, {}).weights.items()
    }
    generator = torch.Generator(model.device).manual_seed(seed)
    special = [token for token in model.tokenizer.all_special_ids if token < model.config.vocab_size]
    start = _start(model, count, generator)
    sequences: list[Tensor] = []
    parts = start.split(max(1, _cache_bytes(model.device) // _bytes_per_sequence(model.config, seqlen, model.dtype)))
    with show_progress("write", len(parts) * seqlen) as progress:
        for last in parts:
            cache, tokens = StaticCache(config=model.config, max_cache_len=seqlen), []
            for _ in range(seqlen):
                inputs = {"input_ids": last, CACHE: cache, "use_cache": True, "logits_to_keep": 1}
                logits = functional_call(model.skeleton, weights, (), inputs).logits[:, -1].float()
                logits[:, special] = -torch.inf
                last = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                tokens.append(last)
                progress.advance("")
            sequences.append(torch.cat(tokens, 1).cpu())
    return torch.cat(sequences)


def _start(model: Model, count: int, generator: torch.Generator) -> Tensor:
    token = model.tokenizer.bos_token_id
    if token is not None:
        return torch.full((count, 1), token, device=model.device)
    return torch.randint(0, model.config.vocab_size, (count, 1), generator=generator, device=model.device)


def _bytes_per_sequence(config: Any, seqlen: int, dtype: torch.dtype) -> int:
    """What the keys and values of one sequence take."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * seqlen * dtype.itemsize


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(_CACHE_SHARE * torch.cuda.mem_get_info(device)[0])
    return _CACHE_BYTES
