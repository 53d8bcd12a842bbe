"""The models of the ladder, two of them bundled: how they are built, their loss, and how they are written."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from lsiq.bundle.ladder import Rung
from lsiq.bundle.tokenizer import save_tokenizer

POSITIONS = 1024


def build_model(family: str, vocab: int, rung: Rung) -> PreTrainedModel:
    """Return a freshly initialised float32 model of the family, dropout off, with tied embeddings.

    No padding id is configured: the embedding would never train the row of a padding token, which here also ends texts.
    """
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "tie_word_embeddings": True}
    shape = {"vocab_size": vocab, "hidden_size": rung.hidden, "num_hidden_layers": rung.blocks}
    shape |= {"num_attention_heads": rung.heads, "max_position_embeddings": POSITIONS}
    if family == "llama":
        sizes = {"intermediate_size": rung.llama_ffn, "num_key_value_heads": rung.kv_heads}
        sizes["head_dim"] = rung.hidden // rung.heads
        model = LlamaForCausalLM(LlamaConfig(**shape, **sizes, **special))
    else:
        sizes = {"ffn_dim": rung.opt_ffn, "word_embed_proj_dim": rung.hidden}
        rates = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0, "do_layer_norm_before": True}
        model = OPTForCausalLM(OPTConfig(**shape, **sizes, **rates, **special))
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return model.train()


def hidden_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the final normed hidden states `(batch, T, hidden)` of unpadded sequences `(batch, T)`.

    Calls the decoder layers itself: under torch.compile, transformers before torch 2.14 always builds a dense causal
    mask (huggingface/transformers, `_ignore_causal_mask_sdpa`), which rules out the flash kernel.
    """
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    if isinstance(model, LlamaForCausalLM):
        decoder = model.model
        x = decoder.embed_tokens(ids)
        rotary = decoder.rotary_emb(x, position_ids=positions)
        for layer in decoder.layers:
            x = layer(x, attention_mask=None, position_embeddings=rotary, position_ids=positions, use_cache=False)
        return decoder.norm(x)
    decoder = model.model.decoder
    x = decoder.embed_tokens(ids) + decoder.embed_positions(None, position_ids=positions)
    for layer in decoder.layers:
        x = layer(x, attention_mask=None, position_ids=positions, use_cache=False)
    return decoder.final_layer_norm(x)


def token_loss(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Return the mean next-token loss (nats, float32) of windows `(batch, T + 1)`."""
    with torch.autocast(window.device.type, torch.bfloat16, enabled=window.is_cuda):
        logits = model.lm_head(hidden_states(model, window[:, :-1]))
    return cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


def save_checkpoint(model: PreTrainedModel, tokenizer: Tokenizer, out: Path) -> None:
    """Write model and tokenizer to `out` as `AutoModelForCausalLM.from_pretrained` loads them.

    The model itself becomes bfloat16 too.
    """
    nn.Module.to(model, torch.bfloat16).eval()
    model.save_pretrained(out)
    save_tokenizer(tokenizer, out)
