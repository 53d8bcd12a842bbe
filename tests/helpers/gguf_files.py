"""Writes GGUF files for tests, from a checkpoint folder, by the gguf package alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.families import FAMILIES as TINY
from helpers.models import SHAPES
from safetensors.torch import load_file

ARCHITECTURES = {
    **{"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"},
    **{"gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3"},
    **{"olmo2": "olmo2", "smollm3": "smollm3", "granite": "granite"},
}
INTERLEAVED = {"llama", "smollm3", "granite"}  # as llama.cpp's own converter writes their queries and keys
# As wide as transformers, which reads each export back, takes every head of Gemma to be.
WIDE_GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
# Shapes of every family that is read and written, as transformers reads them from a file.
SHAPES_OF_FILES: dict[str, dict[str, Any]] = {
    "llama": SHAPES["llama"],
    "mistral": {**SHAPES["llama"], "model_type": "mistral", "sliding_window": None},
    "qwen2": {**SHAPES["llama"], "model_type": "qwen2"},
    # The head width that transformers' reader of GGUF takes for granted, and all published ones have.
    "qwen3": {**SHAPES["llama"], "model_type": "qwen3", "head_dim": 128},
    "gemma2": TINY["gemma2"] | WIDE_GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": TINY["gemma3"] | WIDE_GEMMA | {"num_hidden_layers": 6, "sliding_window_pattern": 6},
    "phi3": TINY["phi3"] | {"sliding_window": 100},
}
# Of families that are read alone, for transformers does not read their files.
READ_ALONE: dict[str, dict[str, Any]] = {
    "olmo2": TINY["olmo2"],
    "smollm3": TINY["smollm3"] | {"num_hidden_layers": 4, "no_rope_layer_interval": 4},
    "granite": TINY["granite"],
}
# Where ways of splitting words differ: contractions, digits, blanks before them, slashes, capitals inside words.
TEXT = (
    "It's 1984, and IT'S 12345 boats; they'll turn 7  8   9 times at 4 km² or ½ mile:\n\n\n1 HarbourMaster, see "
    "/ships//log\r\n  the lathe_2 of the harbour1984 {}[]: café, 漢字 ١٢٣\t x  "
)
DECOMPOSED = "cafe\u0301 nai\u0308ve"


def write_gguf(
    checkpoint: Path,
    path: Path,
    kind: str,
    extra: Mapping[str, np.ndarray] | None = None,
    pieces: Sequence[str] = (),
    splitter: str | None = "gpt-2",
) -> Path:
    """Write the checkpoint with its matrices as `kind`; vectors are float32, Q and K of LLaMA in llama.cpp's order.

    `pieces` are a vocabulary of SentencePiece, behind the special tokens and the bytes, that replaces the tokenizer;
    `splitter` is what the file calls the way in which words are split, None for nothing.
    """
    import gguf

    config = json.loads((checkpoint / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture)
    _add_metadata(writer, config)
    if pieces:
        _add_pieces(writer, pieces)
    else:
        _add_tokenizer(writer, json.loads((checkpoint / "tokenizer.json").read_text()), splitter)
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        count = heads.get(name.split(".")[-2]) if architecture in INTERLEAVED else None
        if count is not None:
            halves = tensor.reshape(count, 2, len(tensor) // count // 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        stored = gguf.GGMLQuantizationType["F32" if tensor.dim() == 1 else kind]
        data = gguf.quants.quantize(tensor.float().numpy(), stored)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=stored)
    long = {key: np.array(config["rope_parameters"].get(f"{key}_factor", ()), np.float32) for key in ("short", "long")}
    factors = {f"rope_factors_{key}.weight": divisors for key, divisors in long.items() if len(divisors)}
    for name, array in (factors | dict(extra or {})).items():
        writer.add_tensor(name, array)
    finish(writer)
    return path


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_metadata(writer: Any, config: dict[str, Any]) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_name("a small model")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config["model_type"] in ("gemma2", "gemma3_text", "phi3"):
        _add_windows(writer, config, rope)
    if config["model_type"] == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])


def _add_windows(writer: Any, config: dict[str, Any], rope: dict[str, Any]) -> None:
    from gguf import RopeScalingType

    if config["sliding_window"] is not None:
        writer.add_sliding_window(config["sliding_window"])
    if config["model_type"] == "gemma3_text":  # as every file since it was needed, in blocks from the first
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
        writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _add_tokenizer(writer: Any, tokenizer: dict[str, Any], splitter: str | None) -> None:
    from gguf import TokenType

    vocabulary = {number: piece for piece, number in tokenizer["model"]["vocab"].items()}
    special = {added["id"] for added in tokenizer["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    if splitter is not None:
        writer.add_tokenizer_pre(splitter)
    writer.add_token_list([vocabulary[number] for number in range(len(vocabulary))])
    writer.add_token_types(
        [TokenType.CONTROL if number in special else TokenType.NORMAL for number in range(len(vocabulary))]
    )
    writer.add_token_merges(merges)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(0)


def _add_pieces(writer: Any, pieces: Sequence[str]) -> None:
    from gguf import TokenType

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *spelled, *pieces])
    writer.add_token_scores([-float(number) for number in range(260 + len(pieces))])
    kinds = [(TokenType.CONTROL, special), (TokenType.BYTE, spelled), (TokenType.NORMAL, pieces)]
    writer.add_token_types([kind for kind, tokens in kinds for _ in tokens])
    for number, add in enumerate((writer.add_pad_token_id, writer.add_eos_token_id, writer.add_bos_token_id)):
        add(number)
    writer.add_unk_token_id(3)


def all_weights(model: Any) -> dict[str, torch.Tensor]:
    """Every weight of one of our models, by its name in transformers."""
    found = {
        name: parameter
        for name, parameter in model.skeleton.named_parameters()
        if not name.startswith(f"{model.spec.blocks}.")
    }
    for index in range(model.depth):
        found |= {f"{model.spec.blocks}.{index}.{name}": w for name, w in model.block(index, {}).weights.items()}
    return found
