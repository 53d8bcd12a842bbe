"""The models that are bundled: their shapes, their loss, and how they are written."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from lsiq.assets.tokenizer import save_tokenizer

# 384 channels are six heads of 64, the head size of the large models; six such layers and 4096 pieces make 11 million
# parameters, 22 MB in bfloat16: small enough to ship in a repository, large enough to write English.
HIDDEN, LAYERS, HEADS, POSITIONS = 384, 6, 6, 1024
# Two key-value heads, so that grouped-query attention is exercised; 1024 is 8/3 of the width, the usual gated ratio.
LLAMA_KV_HEADS, LLAMA_FFN = 2, 1024
# OPT's own ratio of 4 (1536) would exceed the 24 MB; with 1280 both families weigh the same.
OPT_FFN = 1280


def build_model(family: str, vocab: int) -> PreTrainedModel:
    """Return a freshly initialised float32 model of the family, dropout off, with tied embeddings.

    No padding id is configured: the embedding would never train the row of a padding token, which here also ends texts.
    """
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "tie_word_embeddings": True}
    shape = {"vocab_size": vocab, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    if family == "llama":
        sizes = {"intermediate_size": LLAMA_FFN, "num_key_value_heads": LLAMA_KV_HEADS, "head_dim": HIDDEN // HEADS}
        model = LlamaForCausalLM(LlamaConfig(**shape, **sizes, **special, max_position_embeddings=POSITIONS))
    else:
        sizes = {"ffn_dim": OPT_FFN, "word_embed_proj_dim": HIDDEN, "max_position_embeddings": POSITIONS}
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
