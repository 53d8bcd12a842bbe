"""Writes GGUF files for tests, from a checkpoint folder, by the gguf package alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def write_gguf(checkpoint: Path, path: Path, kind: str, extra: Mapping[str, np.ndarray] | None = None) -> Path:
    """Write the checkpoint with its matrices as `kind`; vectors are float32, Q and K of LLaMA in llama.cpp's order."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture)
    _add_metadata(writer, config)
    _add_tokenizer(writer, json.loads((checkpoint / "tokenizer.json").read_text()))
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        count = heads.get(name.split(".")[-2]) if architecture == "llama" else None
        if count is not None:  # as llama.cpp's own converter writes it
            halves = tensor.reshape(count, 2, len(tensor) // count // 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        stored = gguf.GGMLQuantizationType["F32" if tensor.dim() == 1 else kind]
        data = gguf.quants.quantize(tensor.float().numpy(), stored)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=stored)
    for name, array in (extra or {}).items():
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
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _add_tokenizer(writer: Any, tokenizer: dict[str, Any]) -> None:
    from gguf import TokenType

    vocabulary = {number: piece for piece, number in tokenizer["model"]["vocab"].items()}
    special = {added["id"] for added in tokenizer["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([vocabulary[number] for number in range(len(vocabulary))])
    writer.add_token_types(
        [TokenType.CONTROL if number in special else TokenType.NORMAL for number in range(len(vocabulary))]
    )
    writer.add_token_merges(merges)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id):
        add(0)


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
